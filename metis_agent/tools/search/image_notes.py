"""What is written about an image file: in it (EXIF, PNG and JPEG comments) and beside it (captions).

Beside it: `cat.txt` or `cat.json` next to `cat.jpg`, and lines `{"file_name": "cat.jpg", ...}` of a
`metadata.jsonl` in its folder, as Hugging Face's image folders have. Of JSON, all strings are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metis_agent.tools.search.clean import plain_text

__all__ = ["captions_of", "notes_in", "notes_of"]

_MAX_NOTE = 2_000
_MAX_FILE = 100_000
# ImageDescription, Artist, Copyright, DateTime; Windows: XPTitle, XPComment, XPKeywords, XPSubject
_TAGS = (0x010E, 0x013B, 0x8298, 0x0132, 0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F)
_USER_COMMENT = (0x8769, 0x9286)


def notes_of(file: Path, image: Any, captions: dict[str, str]) -> str:
    """Return what is written in an opened image and beside its file, as one line."""
    noted = [captions.get(file.name, ""), *(_beside(file.with_suffix(suffix)) for suffix in (".txt", ".json"))]
    return " ".join(note for note in (*noted, *notes_in(image)) if note)


def notes_in(image: Any) -> list[str]:
    """Return the notes that an opened image holds; a broken one has none."""
    try:
        found = [value for key, value in image.info.items() if isinstance(value, str) and key != "xmp"]
        found.append(image.info.get("comment"))
        exif = image.getexif()
        found += [exif.get(tag) for tag in _TAGS]
        found.append(exif.get_ifd(_USER_COMMENT[0]).get(_USER_COMMENT[1]))
    except Exception:  # hostile metadata raises anything; the image itself may still be good
        return []
    return list(dict.fromkeys(note for value in found if (note := plain_text(_text(value), _MAX_NOTE))))


def captions_of(folder: Path) -> dict[str, str]:
    """Return captions by file name from the folder's `metadata.jsonl`; lines that can't be read are left out."""
    captions: dict[str, str] = {}
    for line in _read(folder / "metadata.jsonl", 100 * _MAX_FILE).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(name := record.pop("file_name", None), str):
            captions[name] = plain_text(" ".join(_strings(record)), _MAX_NOTE)
    return captions


def _beside(file: Path) -> str:
    content = _read(file, _MAX_FILE)
    if file.suffix == ".json" and content:
        try:
            content = " ".join(_strings(json.loads(content)))
        except (ValueError, RecursionError):
            return ""
    return plain_text(content, _MAX_NOTE)


def _read(file: Path, size: int) -> str:
    try:
        with file.open("rb") as content:
            return content.read(size).decode("utf-8", "replace") if file.is_file() else ""
    except OSError:
        return ""


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        value = bytes(value)
    if not isinstance(value, bytes):
        return ""
    if value[:8] in (b"ASCII\0\0\0", b"\0" * 8):
        value = value[8:]
    utf16 = value[1:2] == b"\0"
    return value.decode("utf-16-le" if utf16 else "utf-8", "replace").rstrip("\0")
