"""Where a command's words, bars and figures go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from metis_agent import formats
from metis_agent.formats import atomic_write

__all__ = ["JsonOption", "progress_bars", "screen", "write_json"]

JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Also write all figures to this file; '-': to standard output, and nothing else there."
    ),
]

_STDOUT = Path("-")


def screen(json: Path | None) -> Console:
    """Where people read: standard output, or standard error where the figures go to standard output."""
    return Console(stderr=json == _STDOUT)


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
