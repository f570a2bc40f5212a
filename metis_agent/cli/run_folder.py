"""The folder of a training run, made ready: empty for a new run, as it was for one that was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from metis_agent.errors import ConfigurationError
from metis_agent.formats import RUN_FILE, atomic_write, check_settings, settings_text

__all__ = ["FreshOption", "prepare_folder"]

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


def _clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
