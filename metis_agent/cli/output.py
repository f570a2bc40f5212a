"""Where a command's words, bars and figures go, and where a training run lives: its folder, and the stack it needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.errors import MarkupError
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from metis_agent import formats
from metis_agent.errors import ConfigurationError, MissingDependencyError, StorageError
from metis_agent.formats import RUN_FILE, atomic_write, check_settings, settings_text

__all__ = [
    "FreshOption",
    "JsonOption",
    "RayOption",
    "is_finished",
    "prepare_folder",
    "progress_bars",
    "quiet_libraries",
    "screen",
    "step_bar",
    "training_libraries",
    "write_json",
]

JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write all figures to this file; '-': to standard output, and nothing else there."
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        help="Spread the work over a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; local for the processors of this "
        "machine. The result is the same. Needs the extra 'ray', and that its machines see the same files.",
        show_default=False,
    ),
]

_STDOUT = Path("-")
_PAGE = 1 << 14

_UNSEEN = re.compile(
    r"[^\n\t\x20-\x7e\xa0-\u200a\u2010-\u2027\u202f-\u205f\u2070-\ud7ff\ue000-\ufefe\uff00-\ufff8\ufffc-\U000dffff]"
)
_LINK = re.compile(r"(?<!\\)\[(?=link|@)")


class Screen(Console):
    """A terminal that names from records can't write to: control characters are shown, and no text is a link.

    What is no markup, such as a tool named `a[/x]b`, is printed as it is.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, of a text that may hold what somebody else wrote."""
        text = _UNSEEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)
        text = _LINK.sub(r"\\[", text)
        try:
            return super().render_str(text, **options)
        except MarkupError:
            return super().render_str(text, **{**options, "markup": False})


def screen(json: Path | None) -> Console:
    """Where people read: standard output, or standard error where the figures go to standard output.

    Raises:
        StorageError: the figures could not be written at the end, when they were paid for.
    """
    if json not in (None, _STDOUT):
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=json.parent) as tried:
                tried.write(bytes(_PAGE))
        except OSError as error:
            raise StorageError(
                f"--json {str(json)!r} can't be written: {error.strerror}. Name another file."
            ) from error
    return Screen(stderr=json == _STDOUT)


@contextmanager
def progress_bars(console: Console, *, width: int = 28) -> Iterator[Progress]:
    """Bars with counts, times, and the time left; descriptions get so many columns at least."""
    columns = (
        TextColumn(f"{{task.description:<{width}}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Whole or not at all, with its version, and valid JSON: what could not be measured is null."""
    versioned = formats.with_format(figures, formats.FIGURES)
    text = json.dumps(_no_nan(versioned), indent=2, default=float, allow_nan=False)
    if path == _STDOUT:
        print(text, flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, f"{text}\n".encode())


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _no_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


FreshOption = Annotated[bool, typer.Option("--fresh", help="Start again instead of going on with a stopped run.")]


def prepare_folder(
    folder: Path,
    settings: Mapping[str, Any],
    console: Console,
    *,
    parts: Sequence[str],
    option: str,
    fresh: bool,
) -> None:
    """Make the folder ready, and say where a run that was stopped goes on.

    Args:
        folder: of the run.
        settings: what a run must have in common with the one that it goes on with; they have a JSON form.
        console: where it is said.
        parts: files and folders that a run makes, which a new one clears away.
        option: by which another folder is named.
        fresh: start again.

    Raises:
        ConfigurationError: it holds a run with other settings, or no run and other files.
        SchemaVersionError: a newer Metis began the run.
    """
    note = folder / RUN_FILE
    if note.exists() and not fresh:
        check_settings(note.read_bytes(), settings, str(folder), option=option)
        console.print("Going on with the run that was stopped.")
        return
    if not note.exists() and folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"{str(folder)!r} holds other files; name another {option}.")
    for part in parts:
        _clear(folder / part)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(note, settings_text(settings).encode())


def is_finished(folder: Path, settings: Mapping[str, Any], console: Console, *, option: str) -> bool:
    """Whether the folder holds a run with these settings that has written its last file, `metrics.json`; it says so.

    Raises:
        ConfigurationError, SchemaVersionError: as `prepare_folder`.
    """
    note = folder / RUN_FILE
    if not (note.exists() and (folder / "metrics.json").exists()):
        return False
    check_settings(note.read_bytes(), settings, str(folder), option=option)
    console.print(f"The run in {escape(str(folder))} is finished, and stays as it is; --fresh makes it again.")
    return True


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def training_libraries(extra: str = "train") -> Iterator[None]:
    """Where `numpy` and its like are needed: one thread each, and what to install where they are missing."""
    # Thread pools read this when numpy is imported; one thread is quickest for sparse work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] == "metis_agent":
            raise  # a fault of ours, which nothing that one can install would mend
        raise MissingDependencyError(
            f"this command needs {missing.name!r}; install it with: pip install 'langgraph-metis[{extra}]'"
        ) from missing


def quiet_libraries() -> None:
    """Have torch, transformers and TRL, which read this when they are imported, look nothing up and say little."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest on one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def step_bar(bars: Progress, description: str) -> Any:
    """A callback of a trainer that moves a bar."""
    from transformers import TrainerCallback

    class StepBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.task = bars.add_task(description, total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bars.update(self.task, completed=state.global_step)

    return StepBar()
