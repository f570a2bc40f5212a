"""The images that a file of questions names: files beside it, or data URIs, each checked before anything is asked.

Beside `question_files`. A file of questions may be anybody's, so it names no address, and no file but those in its own
folder and below: what it names is sent to a model's service.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from metis_agent.errors import InputError

__all__ = ["IMAGES", "question_images"]

IMAGES = "images"
"""Column of the file, and key of `Question.metadata`, which holds data URIs."""


def question_images(named: Any, folder: Path, place: str) -> list[str]:
    """Data URIs of the images that a row names.

    Args:
        named: One name or a list of them: relative paths, or data URIs.
        folder: Of the file of questions.
        place: Of the row, for messages.

    Raises:
        InputError: one is outside of the folder, or is no image that can be used.
        MissingDependencyError: Pillow is not installed.
    """
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{place} has images={named!r:.200}; name files beside the file of questions, or data URIs.")
    return [_checked(name, folder, place) for name in names]


def _checked(name: str, folder: Path, place: str) -> str:
    from metis_agent.tools.images import data_uri_content
    from metis_agent.tools.sendable import RULES, sendable_image

    try:
        content = data_uri_content(name, RULES) if name[:5].lower() == "data:" else _file(name, folder, RULES.max_bytes)
        return sendable_image(content).uri
    except InputError as error:
        raise InputError(f"{place}: the image {name[:100]!r} can't be used: {error}") from error


def _file(name: str, folder: Path, most: int) -> bytes:
    if "://" in name:
        raise InputError("nothing is fetched; put the file beside the file of questions and give its name.")
    path = PurePosixPath(name)
    there = folder / path
    try:
        if path.is_absolute() or ".." in path.parts or not there.resolve().is_relative_to(folder.resolve()):
            raise InputError("it is outside of the folder of the questions.")
        if not there.is_file():
            raise InputError("there is no such file.")
        with there.open("rb") as file:
            return file.read(most + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a null
        raise InputError(f"it can't be read: {error}.") from error
