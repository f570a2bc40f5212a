"""Versions of the small files that Metis writes and reads again, and the one rule that they share.

Trajectories (`recording.schema`) and gates (`gates.artefact`) have versions of their own. All other JSON carries
`"format"`: without it a file is of version 1; with a newer one than is known it is refused, never half understood.
A key that is added needs no new version; one that is renamed or changes its meaning does, and a step that reads the
old one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metis_agent.errors import InputError, SchemaVersionError

__all__ = ["CACHE", "FIGURES", "QUESTIONS", "RUN", "check_format", "check_number", "with_format", "without_format"]

RUN = 1
"""`run.json`: the settings that a run which was stopped goes on with, and the counts beside it."""
FIGURES = 1
"""What `--json FILE` writes, and `metrics.json` of the demo."""
QUESTIONS = 1
"""A line of curated questions."""
CACHE = 1
"""The SQLite files that curation keeps: its cache, and its counts of prompts."""


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
