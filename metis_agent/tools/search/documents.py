"""The documents of a local corpus, and how they are read from files.

A folder holds `.jsonl` (one `{"text", "title", "url", "id"}` a line, all but `text` optional), `.md` and
`.txt` files. Markdown and text are cut into passages: a hit is what a model reads at once, not a book.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metis_agent.errors import ConfigurationError, InputError

__all__ = ["Document", "digest_documents", "digest_path", "read_documents"]

_PASSAGE = 1_200
_SUFFIXES = (".jsonl", ".md", ".txt")
_FITTING = re.compile(rf"(?s).{{1,{_PASSAGE}}}(?!\S)|.{{1,{_PASSAGE}}}")
_HEADING = re.compile(r"#{1,6}\s+(.+?)\s*#*$")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text to be found."""

    id: str
    text: str
    title: str = ""
    url: str = ""


def read_documents(path: str | Path) -> Iterator[Document]:
    """Read a `.jsonl`, `.md` or `.txt` file, or all of them in a folder and below, by name.

    Raises:
        ConfigurationError: there is no such file, or a folder holds none of these.
        InputError: a line of JSONL is no document.
    """
    for file, name in _files(Path(path)):
        if file.suffix == ".jsonl":
            yield from _from_jsonl(file, name)
        else:
            yield from _passages(file.read_text("utf-8", "replace"), file.stem, name)


def digest_path(path: str | Path) -> str:
    """Return a hash of all that `read_documents` would read; it changes with any byte or file name."""
    total = hashlib.blake2b(digest_size=16)
    for file, name in _files(Path(path)):
        with file.open("rb") as content:
            total.update(repr((name, hashlib.file_digest(content, "blake2b").digest())).encode())
    return total.hexdigest()


def digest_documents(documents: Iterable[Document]) -> str:
    """Return a hash of the documents, in their order."""
    total = hashlib.blake2b(digest_size=16)
    for document in documents:
        # repr, because it keeps the fields apart and escapes what is no UTF-8.
        fields = (document.id, document.title, document.text, document.url)
        total.update(repr(fields).encode("utf-8", "replace"))
    return total.hexdigest()


def _files(path: Path) -> list[tuple[Path, str]]:
    """Return the files to read with their names relative to the folder."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file()]
        files = sorted((file, file.relative_to(path).as_posix()) for file in found)
    else:
        files = [(path, path.name)] if path.is_file() and path.suffix in _SUFFIXES else []
    if not files:
        raise ConfigurationError(
            f"no documents at {str(path)!r}; name a .jsonl, .md or .txt file, or a folder that holds some."
        )
    return files


def _from_jsonl(file: Path, name: str) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _document(line, f"{name}:{number}")


def _document(line: str, place: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{place} is no document; each line is an object with a string "text".')
    return Document(
        id=str(record.get("id") or place),
        text=record["text"],
        title=str(record.get("title") or ""),
        url=str(record.get("url") or ""),
    )


def _passages(text: str, stem: str, name: str) -> Iterator[Document]:
    """Yield whole paragraphs, as many as fit a passage, under the last heading above them."""
    title, parts, number = stem, list[str](), 0
    for paragraph in (*_paragraphs(text), None):
        heading = _heading(paragraph, name)
        full = paragraph is None or sum(map(len, parts)) + len(paragraph) > _PASSAGE
        if parts and (full or heading):
            number += 1
            yield Document(id=f"{name}#{number}", title=title, text="\n\n".join(parts))
            parts = []
        if heading:
            title = heading
        if paragraph is not None:
            parts.append(paragraph)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs; one longer than a passage is cut, between words where that can be."""
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in _FITTING.findall(paragraph):
            if piece.strip():
                yield piece.strip()


def _heading(paragraph: str | None, name: str) -> str:
    """Return the Markdown heading that the paragraph begins with, or an empty string."""
    if paragraph is None or not name.endswith(".md"):
        return ""
    match = _HEADING.match(paragraph.partition("\n")[0])
    return match[1] if match else ""
