"""Questions from files, and the one reader of tables: JSONL, CSV, Parquet and registered formats.

Text stays text: in a CSV the id "007" is not 7, and which columns are numbers is for the reader of the rows to know
(questions here, outcomes in `outcomes`).

A row a question: `question` (or `text`), optional `id`, `answer`, `verifier`, `kind`, `context` and `images`. Any other
column goes along in `Question.metadata`, for `--group-by` and the like.

Images are files beside it, or data URIs, each checked before anything is asked. A file of questions may be anybody's,
so it names no address, and no file but those in its own folder and below: what it names is sent to a model's service.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError
from metis_agent.judging.verifiers import JUDGE, VERIFIERS
from metis_agent.types import Question

__all__ = [
    "CONTEXT",
    "IMAGES",
    "TABLE_FORMATS",
    "Row",
    "question_images",
    "read_questions",
    "read_rows",
    "register_table_format",
]

Row = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time.

    Raises:
        ConfigurationError: a format that is not read.
        InputError: the file can't be read; the message names the line where there is one.
        MissingDependencyError: the format needs an extra.
    """
    reader = TABLE_FORMATS.get(path.suffix.lower())
    if reader is None:
        raise ConfigurationError(
            f"{str(path)!r} is none of {sorted(TABLE_FORMATS)!r}: convert it, rename it if it is, or register its "
            "format (metis_agent.rollouts.questions.register_table_format)."
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{str(path)!r} can't be read as {path.suffix!r}: {error}.") from error


def register_table_format(suffix: str, reader: Callable[[Path], Iterator[Row]]) -> None:
    """Read files of this suffix, such as ".xlsx", by `reader`, which yields their rows.

    Raises:
        ConfigurationError: the suffix has no dot, or is another format's.
    """
    if not suffix.startswith(".") or TABLE_FORMATS.get(suffix, reader) is not reader:
        raise ConfigurationError(f"{suffix!r} can't be registered: a new suffix such as '.xlsx' is wanted.")
    TABLE_FORMATS[suffix] = reader


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path.name} line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name} line {number} is {row!r}; each line is one JSON object.")
            yield row


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a picture, or a long passage
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or () if name]
        if len({*names}) < len(names):
            raise InputError(f"{path.name} names a column twice, of {names!r}: each needs a name of its own.")
        for row in reader:
            if any(row.pop(None, ())):  # where it keeps what is left over
                raise InputError(
                    f"{path.name} line {reader.line_num} has more cells than there are columns: put text with a comma "
                    "or a line break into double quotes."
                )
            yield {name: value or None for name, value in row.items()}  # an empty cell says nothing


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as missing:
        raise MissingDependencyError(
            f"Reading {path.name!r} needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield {name: _text_of(value) for name, value in row.items()}
    except pa.ArrowException as error:
        raise InputError(f"{str(path)!r} can't be read as '.parquet': {error}.") from error


def _text_of(cell: Any) -> Any:
    """Text that was written without saying that it is text; other bytes stay what they are."""
    try:
        return cell.decode() if isinstance(cell, bytes) else cell
    except UnicodeDecodeError:
        return cell


TABLE_FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
"""Readers by the suffix of a file's name."""


CONTEXT = "context"
"""Key of `Question.metadata` with what came along with the question; its text then begins with it."""

_OWN = ("id", "question", "text", "answer", "verifier", "kind", CONTEXT)


def read_questions(path: str | Path) -> list[Question]:
    """Read a file of questions.

    A row that is there twice counts once. Without an `id` it is made from the text. Without a `verifier` the answer is
    looked for in what the model says, a sentence or a few (`prose`). A context goes before the question,
    with a blank line between. Images are named as files beside this one, or given as data URIs.

    Raises:
        ConfigurationError: a format that is not read.
        InputError: the file can't be read, or a row has no question, an unknown verifier, an image that can't be used,
            or the id of another.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_rows(path), start=1):
        question = _question(row, path.parent, f"{path.name} row {number}")
        earlier = questions.setdefault(question.id, question)
        if (earlier.text, earlier.answer) != (question.text, question.answer):
            raise InputError(
                f"{path.name} row {number} asks {question.text!r} with the answer {question.answer!r}, and an "
                f"earlier row of the same id, {question.id!r}, {earlier.text!r} with {earlier.answer!r}; keep one."
            )
    if not questions:
        raise InputError(f"{str(path)!r} has no rows; write one question a row.")
    return list(questions.values())


def _question(row: Mapping[str, Any], folder: Path, place: str) -> Question:
    asked = _said(row.get("question")).strip() or _said(row.get("text")).strip()
    if not asked:
        raise InputError(f"{place} has no question: its columns are {sorted(row)!r}; name one 'question'.")
    answer = None if row.get("answer") in (None, "") else str(row["answer"])
    verifier = str(row.get("verifier") or "prose")
    if verifier not in (known := [*VERIFIERS, JUDGE]):
        raise InputError(
            f"{place} has the verifier {verifier!r}; leave it out, choose of {known!r}, or register it "
            "(metis_agent.judging.verifiers.register_verifier)."
        )
    metadata = {name: value for name, value in row.items() if name not in _OWN and value is not None}
    if row.get(IMAGES):
        metadata[IMAGES] = question_images(row[IMAGES], folder, place)
    if context := _said(row.get(CONTEXT)).strip():
        metadata[CONTEXT] = context
    text = f"{context}\n\n{asked}" if context else asked
    return Question(
        id=_said(row.get("id")) or _id_of(text, metadata.get(IMAGES) or ()),
        text=text,
        answer=answer,
        verifier=verifier,
        kind=_said(row.get("kind")),
        metadata=metadata,
    )


def _said(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _id_of(text: str, images: Sequence[str]) -> str:
    """The same words about another picture are another question."""
    asked = "\x00".join((text, *images)) if images else text
    return f"q-{hashlib.sha256(asked.encode(errors='surrogatepass')).hexdigest()[:16]}"


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
    from metis_agent.tools.images import RULES, data_uri_content, sendable_image

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
