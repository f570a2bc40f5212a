"""The documents of a local corpus: how they are read from files, and how their text becomes search terms.

A folder holds `.jsonl` (one `{"text", "title", "url", "id"}` a line, all but `text` optional), `.md` and
`.txt` files. Markdown and text are cut into passages: a hit is what a model reads at once, not a book.

Terms are the same for the index and for queries. SQLite's `unicode61` tokenizer splits at spaces and punctuation, so a
Chinese sentence would be one term. Runs of the scripts that are written without spaces (and of Korean, whose particles
stick to the words) are cut into overlapping pairs of characters, as Lucene's CJKAnalyzer does; the last character also
stands alone, so that a query of one character finds every run that holds it, by prefix.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metis_agent.errors import ConfigurationError, InputError

__all__ = ["TOKENIZER", "Document", "digest_documents", "digest_path", "index_text", "query_terms", "read_documents"]

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


TOKENIZER = "unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'"
"""The FTS5 tokenizer that this module prepares text for: marks belong to words, as in Hindi and Thai."""

_MAX_QUERY = 2_000
_MAX_TERMS = 64

_UNSPACED = re.compile(
    "["
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b"  # radicals, iteration marks, numerals
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff"  # hangul
    "]+"
)


def index_text(text: str) -> str:
    """Return the text as it goes into the index."""
    if text.isascii():
        return text
    return _UNSPACED.sub(_with_last_alone, _normal(text))


def query_terms(query: str) -> dict[str, str]:
    """Return the query's distinct terms: each as it stands in the index -> the FTS5 expression for it.

    Every expression is quoted, so nothing in a query is an operator. Of a very long query, the start counts.
    """
    words = _letters(_normal(query[:_MAX_QUERY]))
    terms: dict[str, str] = {}
    for word in words.split():
        for start, end in _pieces(word):
            piece = word[start:end]
            alone = end - start == 1 and _UNSPACED.match(piece)
            terms.setdefault(_folded(piece), f'"{piece}"*' if alone else f'"{piece}"')
            if len(terms) == _MAX_TERMS:
                return terms
    return terms


def _normal(text: str) -> str:
    # Half-width kana, full-width Latin and ligatures become the usual characters. A lone surrogate is no
    # text, and SQLite would refuse it.
    return unicodedata.normalize("NFKC", text).encode("utf-8", "replace").decode()


def _letters(text: str) -> str:
    """Replace what the tokenizer takes for a separator by a space."""
    return "".join(c if _in_word(c) else " " for c in text)


def _in_word(character: str) -> bool:
    category = unicodedata.category(character)
    return category[0] in "LN" or category in ("Co", "Mn", "Mc")


def _pieces(word: str) -> list[tuple[int, int]]:
    """Return the places of a word's terms: pairs in unspaced runs, the rest whole."""
    places: list[tuple[int, int]] = []
    done = 0
    for run in _UNSPACED.finditer(word):
        start, end = run.span()
        if done < start:
            places.append((done, start))
        places.extend((i, i + 2) for i in range(start, end - 1))
        if end - start == 1:
            places.append((start, end))
        done = end
    if done < len(word):
        places.append((done, len(word)))
    return places


def _with_last_alone(run: re.Match[str]) -> str:
    text = run[0]
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    return f" {' '.join((*pairs, text[-1]))} "


def _folded(term: str) -> str:
    """Return the term as the tokenizer stores it: lower case, no diacritics."""
    if term.isascii():
        return term.lower()
    decomposed = unicodedata.normalize("NFD", term.lower())
    bare = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")
    return unicodedata.normalize("NFC", bare)
