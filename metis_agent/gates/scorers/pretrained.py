"""What scorers and policies on transformers models share: loading, with errors that say what to do, and batching.

Imports torch and transformers inside the functions: a gate of kind `features` needs neither.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from metis_agent.errors import CheckpointError, ConfigurationError, MissingDependencyError

__all__ = ["Batcher", "check_source", "import_transformers", "load_part", "pick_device", "quiet"]


def import_transformers(what: str) -> Any:
    """The module `transformers`.

    Raises:
        MissingDependencyError: it, or torch, is not installed.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as missing:
        raise MissingDependencyError(
            f"{what} needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    return transformers


def pick_device(device: str | None) -> Any:
    """`device`, or the accelerator where there is one, or the CPU."""
    import torch

    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ConfigurationError(f"device={device!r}: {error}. Name one such as 'cpu' or 'cuda'.") from error
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def check_source(model: str) -> str:
    """A folder, or the name of a model on the Hub; returned as it is given.

    Raises:
        ConfigurationError: it looks like a folder, and there is none, or it holds no model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"model={model!r} has no config.json, so it is no model folder. Give one that save_pretrained wrote "
                "for model and tokenizer."
            )
        return str(folder)
    if not model or model[0] in "./~\\" or model.count("/") > 1 or folder.exists():
        raise ConfigurationError(
            f"model={model!r}: there is no such folder. Give a folder that save_pretrained wrote, or the name of a "
            "model on the Hub such as 'answerdotai/ModernBERT-base' (encoder) or 'Qwen/Qwen3-0.6B' (decision_lm)."
        )
    return model


def load_part(loader: Any, source: str | Path, *, local: bool = False, **options: Any) -> Any:
    """`loader.from_pretrained(source)`, quietly: never pickle, never code from the source.

    Args:
        loader: An `Auto...` class of transformers.
        source: Folder, or name on the Hub.
        local: It is a gate's own folder.
        options: For `from_pretrained`.

    Raises:
        CheckpointError: it can't be loaded.
    """
    try:
        with quiet():
            return loader.from_pretrained(source, local_files_only=local, trust_remote_code=False, **options)
    except Exception as error:  # a foreign folder can fail anywhere; tokenizers raises bare Exception
        remedy = (
            "Export the gate again."
            if local
            else "Check the name; where there is no network, fetch it with `hf download OWNER/NAME --local-dir FOLDER` "
            "elsewhere and give the folder."
        )
        raise CheckpointError(f"{str(source)!r} does not load with {loader.__name__}: {error} {remedy}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars and notes of transformers, such as that a new head has random weights: it is to be trained."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions have no annotations

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batcher(Generic[Request, Answer]):
    """Gathers the requests of concurrent threads.

    Args:
        work: Answers a batch, in order; never called twice at the same time.
        limit: Requests in a batch, at most.
    """

    def __init__(self, work: Callable[[Sequence[Request]], Sequence[Answer]], limit: int) -> None:
        self._work = work
        self._limit = limit
        self._waiting: list[_Place[Request, Answer]] = []
        self._guard, self._turn = threading.Lock(), threading.Lock()

    def ask(self, request: Request) -> Answer:
        """The answer to one request; what `work` raises of it is raised here."""
        place: _Place[Request, Answer] = _Place(request)
        with self._guard:
            self._waiting.append(place)
        while not place.done:
            with self._turn:
                if not place.done:
                    self._answer_some()
        return place.result()

    def _answer_some(self) -> None:
        with self._guard:
            batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
        try:
            answers = self._work([place.request for place in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].fail(error)
            # One bad request must not fail those that happened to come with it.
            for place in batch if len(batch) > 1 else []:
                try:
                    place.answer(self._work([place.request])[0])
                except Exception as own:
                    place.fail(own)
        except BaseException as error:
            for place in batch:
                place.fail(error)
            raise
        else:
            for place, answer in zip(batch, answers, strict=True):
                place.answer(answer)


class _Place(Generic[Request, Answer]):
    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = False
        self._answers: list[Answer] = []
        self._error: BaseException | None = None

    def answer(self, answer: Answer) -> None:
        self._answers.append(answer)
        self.done = True

    def fail(self, error: BaseException) -> None:
        self._error = error
        self.done = True

    def result(self) -> Answer:
        if self._error is not None:
            raise self._error
        return self._answers[0]
