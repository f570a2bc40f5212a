"""Pretrained models in a gate: loaded with care, and the sequence classifier that the `encoder` policy is.

Loading says in its errors what to do. torch and transformers are imported inside the functions: a gate of kind
`features` needs neither. Question and context go in as a pair, the longer of the two cut where they don't fit.
`EncoderModel`, with one logit a branch, is what training (`metis_agent.hdpo.policies.encoder`) and serving share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from metis_agent.errors import CheckpointError, ConfigurationError, MissingDependencyError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.scorers import Asked

__all__ = [
    "Batcher",
    "EncoderModel",
    "EncoderScorer",
    "check_source",
    "import_transformers",
    "load_part",
    "pick_device",
    "quiet",
]


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


BATCH = 32


class EncoderModel:
    """A classifier and its tokenizer.

    Args:
        model: `AutoModelForSequenceClassification`, one label a head.
        tokenizer: Its tokenizer.
        max_length: Tokens of question and context together, at most.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model = model
        self._tokenizer = tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        # Decoders with a classification head look for the last token that is no padding.
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), max_length)
        self.max_length = min(limit for limit in limits if limit)

    def logits(self, questions: Sequence[str], contexts: Sequence[str] | None) -> Any:
        """Tensor [n, H]."""
        texts = (list(questions),) if contexts is None else (list(questions), list(contexts))
        inputs = self._tokenizer(
            *texts, truncation="longest_first", max_length=self.max_length, padding=True, return_tensors="pt"
        )
        return self.model(**inputs.to(self.model.device)).logits.float()


class EncoderScorer:
    """Serves an artefact of kind `encoder`; concurrent questions share a forward pass.

    Args:
        artefact: The gate's folder.
        device: Where it runs; by default the accelerator, where there is one.

    Raises:
        CheckpointError: the model can't be loaded, or has another number of heads.
        MissingDependencyError: torch or transformers is not installed.
    """

    instant = False
    open_tools = False
    draft_columns: tuple[str, ...] = ()

    def __init__(self, artefact: Artefact, device: str | None = None) -> None:
        transformers = import_transformers("A gate of kind 'encoder'")
        folder: Path = artefact.folder
        model = load_part(transformers.AutoModelForSequenceClassification, folder, local=True, use_safetensors=True)
        heads = len(artefact.tools) + 1
        if model.config.num_labels != heads:
            raise CheckpointError(
                f"{str(folder)!r} has a classifier of {model.config.num_labels!r} labels for {heads} heads (direct and "
                f"{len(artefact.tools)} tools); train the gate again."
            )
        tokenizer = load_part(transformers.AutoTokenizer, folder, local=True)
        policy = artefact.description["policy"]
        self._background = bool(policy["context"] or policy.get("history"))
        self._encoder = EncoderModel(model.to(pick_device(device)).eval(), tokenizer, int(policy["max_length"]))
        self._batcher: Batcher[Asked, list[float]] = Batcher(self._answer, BATCH)

    def logits(self, asked: Asked) -> list[float]:
        """See `metis_agent.gates.scorers.Scorer`."""
        return self._batcher.ask(asked)

    def _answer(self, batch: Sequence[Asked]) -> list[list[float]]:
        import torch

        questions = [asked.question for asked in batch]
        contexts = [asked.background for asked in batch] if self._background else None
        with torch.inference_mode():
            rows: list[list[float]] = self._encoder.logits(questions, contexts).tolist()
        return rows
