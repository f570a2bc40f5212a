"""The small files that Metis writes and reads again: written whole or not at all, each with its version.

Trajectories (`recording.schema`) and gates (`gates.artefact`) have versions of their own. All other JSON carries
`"format"`: without it a file is of version 1; with a newer one than is known it is refused, never half understood.
A key that is added needs no new version; one that is renamed or changes its meaning does, and a step that reads the
old one.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError, InputError, SchemaVersionError

__all__ = [
    "CACHE",
    "FIGURES",
    "QUESTIONS",
    "RUN",
    "RUN_FILE",
    "atomic_path",
    "atomic_write",
    "check_format",
    "check_number",
    "check_settings",
    "is_image",
    "settings_text",
    "with_format",
    "without_format",
]

RUN = 1
"""`run.json`: the settings that a run which was stopped goes on with, and the counts beside it."""
FIGURES = 1
"""What `--json FILE` writes, and `metrics.json` of the demo."""
QUESTIONS = 1
"""A line of curated questions."""
CACHE = 1
"""The SQLite files that curation keeps: its cache, and its counts of prompts."""


RUN_FILE = "run.json"

_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")
_SHOWN = 4
"""Settings that a message names at most."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside the file to write to, and rename it at the end: the name never stands for half a file.

    Some files say by their being there that a run began, or is finished. Where the block raises, nothing is left.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a local file whole or not at all, as `atomic_path` does."""
    with atomic_path(path) as beside:
        beside.write_bytes(content)


def with_format(content: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The content, with its version first."""
    return {"format": version, **content}


def without_format(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content alone."""
    return {key: value for key, value in content.items() if key != "format"}


def check_format(content: Mapping[str, Any], newest: int, place: str) -> None:
    """Refuse what a newer Metis wrote.

    Raises:
        SchemaVersionError: the version is newer than `newest`.
        InputError: it is no version.
    """
    check_number(content.get("format", 1), newest, place)


def check_number(version: object, newest: int, place: str) -> None:
    """As `check_format`, of a version that was read from elsewhere."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"{place} has the format {version!r}; a version is an integer from 1. It is no file of ours.")
    if version > newest:
        raise SchemaVersionError(
            f"{place} has format {version!r}; this Metis reads up to {newest}. Upgrade langgraph-metis, or use "
            "the version that wrote it."
        )


def is_image(content: bytes) -> bool:
    """Whether it begins as a PNG, JPEG, GIF, WebP, BMP or TIFF does."""
    return content.startswith(_STARTS)


def settings_text(settings: Mapping[str, Any]) -> str:
    """The file's content, for settings that have a JSON form."""
    return json.dumps(with_format(settings, RUN), indent=2) + "\n"


def check_settings(text: str | bytes, settings: Mapping[str, Any], folder: str, *, option: str) -> None:
    """Refuse to go on with a run that began with other settings.

    Args:
        text: the file's content.
        settings: those of now, as JSON has them.
        folder: where the file is.
        option: by which another folder is named.

    Raises:
        ConfigurationError: some are other ones.
        SchemaVersionError: a newer Metis began the run.
    """
    earlier = json.loads(text)
    check_format(earlier, RUN, f"{RUN_FILE} in {folder!r}")
    before, after = _flat(without_format(earlier)), _flat(settings)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:_SHOWN])
        raise ConfigurationError(
            f"{folder!r} holds a run with other settings: {shown}. Use the same settings to go on with it, --fresh to "
            f"start again, or another {option}."
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            # An empty mapping counts too: a stage without settings is still a stage.
            flat |= _flat(value, f"{prefix}{key}.") or {f"{prefix}{key}": {}}
        else:
            flat[f"{prefix}{key}"] = value
    return flat
