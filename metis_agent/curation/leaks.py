"""Stage `leaks`: training keeps away from the test set, also from questions that are nearly the same.

Dropped is what asks a test question again, exactly or nearly, whatever answer it gives; what holds most of a longer
test question's word 13-grams; and, where questions have images, what shares one with a test question.

Two questions are near duplicates where their letters are (Jaccard index of 5-byte shingles, found by MinHash in a local
file and then computed exactly) *and* their numbers and symbols are the same in the same order: "12 + 7" and "12 - 7"
differ in one character and are two questions.

MinHash with one permutation and rotation: P. Li, A. Owen, C.-H. Zhang, 2012; A. Shrivastava, P. Li, 2014.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from metis_agent.curation.pipeline import KEEP, Row, Verdict, drop
from metis_agent.errors import ConfigurationError
from metis_agent.formats import is_image
from metis_agent.judging.short_answers import normalise
from metis_agent.types import Question

__all__ = ["Fingerprint", "LeaksStage", "Match", "SimilarityIndex", "fingerprint", "images_of", "utf8"]

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s.,!?;:'\"“”‘’`´()\[\]]")
_INLINE = re.compile(r"data:image/[\w.+-]+;base64,[\w+/=%-]+", re.IGNORECASE)
_SHINGLE = 5
_BINS, _ROWS = 32, 4
_MIX = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What tells a question from others."""

    text: str
    """Words, numbers and symbols, one space between them, case folded."""
    marks: str
    """Numbers and symbols, in order."""
    images: str
    """References of its images, in order."""
    answer: str
    """The normalised reference; empty for none."""

    @property
    def exact(self) -> int:
        """The same for questions that differ in spelling only."""
        return _hash(f"{self.text}\x00{self.images}")

    def bands(self) -> list[int]:
        """MinHash bands; near duplicates share at least one, nearly surely."""
        bins = [_MASK] * _BINS
        for shingle in _shingles(self.text):
            mixed = (zlib.crc32(shingle) + 1) * _MIX & _MASK
            mixed = (mixed ^ (mixed >> 29)) * _MIX & _MASK
            place = mixed & (_BINS - 1)
            if mixed < bins[place]:
                bins[place] = mixed
        filled = [value for value in bins if value != _MASK] or [0]
        whole = []
        for place, value in enumerate(bins):
            step = 0
            while value == _MASK and step < _BINS:  # an empty bin borrows from the next full one
                step += 1
                value = bins[(place + step) % _BINS]
            whole.append((value + step * _MIX) & _MASK if value != _MASK else filled[0])
        salt = f"{self.marks}\x00{self.images}"
        return [
            _hash(f"{start}{salt}{whole[start : start + _ROWS]}") for start in range(0, _BINS, _ROWS)
        ]  # marks and images must agree, so they may as well help to find


@dataclass(frozen=True, kw_only=True)
class Match:
    """An earlier question that is the same."""

    number: int
    id: str
    similarity: float
    """Jaccard index; 1 for a question that differs in spelling only."""


def fingerprint(question: Question) -> Fingerprint:
    """The fingerprint of a question; a picture within its text is one of its images."""
    words = _INLINE.sub(" ", question.text)
    tokens = _TOKEN.findall(unicodedata.normalize("NFKC", utf8(words)).casefold())
    images = (*images_of(question), *_INLINE.findall(question.text))
    return Fingerprint(
        text=" ".join(tokens),
        marks=" ".join(token for token in tokens if not token.isalpha()),
        images=utf8(" ".join(map(_reference, images))),
        answer=normalise(utf8(question.answer or "")),
    )


def utf8(text: str) -> str:
    """Half an emoji is no text that SQLite keeps."""
    return text.encode(errors="replace").decode()


_LONGEST_NAME = 1_000
"""Characters of a path or an address; what is longer is a picture, and what is shorter if it begins as one."""


def _reference(image: str) -> str:
    """A short name of an image: of one that is given whole its hash, which is what `ImageStore` calls it too."""
    is_uri = image[:5].lower() == "data:"
    encoded = image.partition(",")[2] if is_uri else image
    may_be_name = not is_uri and len(image) <= _LONGEST_NAME
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        content = b""
    if not content or (may_be_name and not is_image(content)):
        if may_be_name and not any(map(str.isspace, image)):
            return image
        content = image.encode("utf-8", "surrogatepass")
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def images_of(question: Question) -> tuple[str, ...]:
    """References of a question's images: its `images`, or `images` or `image` of its metadata."""
    found = getattr(question, "images", None) or question.metadata.get("images") or question.metadata.get("image") or ()
    if isinstance(found, str | bytes | Mapping):
        found = (found,)
    return tuple(str(reference) for reference in found)


class SimilarityIndex:
    """Questions by fingerprint, in one local file; `None` for memory.

    Each has a number; asking and adding again under the same number, as a resumed run does, changes nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        # Lost on power failure at worst, and then the run is done anew.
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(
            "CREATE TABLE IF NOT EXISTS item (number INTEGER PRIMARY KEY, id TEXT, exact INTEGER, text TEXT,"
            " answer TEXT, images TEXT);"
            "CREATE INDEX IF NOT EXISTS by_exact ON item (exact);"
            "CREATE TABLE IF NOT EXISTS band (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;"
            "CREATE TABLE IF NOT EXISTS image (reference TEXT, number INTEGER, PRIMARY KEY (reference, number))"
            " WITHOUT ROWID;"
        )

    def begin_from(self, number: int) -> None:
        """Forget what a killed run added from this number on, and begin a transaction."""
        self._db.execute("BEGIN")
        if self._db.execute("SELECT 1 FROM item WHERE number >= ? LIMIT 1", (number,)).fetchone():
            for table in ("band", "image", "item"):
                self._db.execute(f"DELETE FROM {table} WHERE number >= ?", (number,))

    def commit(self) -> None:
        """Keep what was added."""
        self._db.execute("COMMIT")

    def add(self, number: int, id_: str, print_: Fingerprint) -> None:
        """Add a question."""
        row = (number, utf8(id_), print_.exact, print_.text, print_.answer, print_.images)
        self._db.execute("INSERT OR REPLACE INTO item VALUES (?, ?, ?, ?, ?, ?)", row)
        self._db.executemany("INSERT OR IGNORE INTO band VALUES (?, ?)", [(key, number) for key in print_.bands()])
        self._db.executemany(
            "INSERT OR IGNORE INTO image VALUES (?, ?)", [(it, number) for it in print_.images.split()]
        )

    def find(self, print_: Fingerprint, *, least: float, same_answer: bool) -> Match | None:
        """The first question that is the same, or the nearest of at least that Jaccard index.

        Args:
            print_: of the question asked about.
            least: from 0 to 1.
            same_answer: whether near duplicates must have the same reference.
        """
        exact = self._db.execute("SELECT number, id FROM item WHERE exact = ? ORDER BY number", (print_.exact,))
        if found := exact.fetchone():
            return Match(number=found[0], id=found[1], similarity=1.0)
        keys = print_.bands()
        rows = self._db.execute(
            "SELECT item.number, item.id, item.text FROM item JOIN (SELECT number, count(*) AS shared FROM band WHERE "
            f"key IN ({','.join('?' * len(keys))}) GROUP BY number) USING (number) WHERE (? OR answer = ?) "
            "ORDER BY shared DESC, number LIMIT ?",
            (*keys, not same_answer, print_.answer, _CANDIDATES),
        )
        mine = _shingles(print_.text)
        best: Match | None = None
        for number, id_, text in rows:
            theirs = _shingles(text)
            similarity = len(mine & theirs) / max(1, len(mine | theirs))
            if similarity >= least and (best is None or similarity > best.similarity):
                best = Match(number=number, id=id_, similarity=similarity)
        return best

    def with_image(self, print_: Fingerprint) -> str | None:
        """The id of a question that shares an image."""
        for reference in print_.images.split():
            row = self._db.execute(
                "SELECT item.id FROM image JOIN item USING (number) WHERE reference = ? LIMIT 1", (reference,)
            ).fetchone()
            if row:
                return str(row[0])
        return None

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM item").fetchone()[0])


def _shingles(text: str) -> set[bytes]:
    content = f" {text} ".encode(errors="surrogatepass")
    return {content[start : start + _SHINGLE] for start in range(max(1, len(content) - _SHINGLE + 1))}


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


T = TypeVar("T")

_GRAM = 13
_COMMON = 8
"""Test questions that share a 13-gram before it counts as boilerplate."""
_CONTAINED = 0.8


class LeaksStage(Generic[T]):
    """Drops rows whose question is in the test set.

    Args:
        test: the test questions.
        question_of: the question of a row.
        folder: where the index of the test set is kept; `None` for memory.
        least: Jaccard index from which two questions are the same.

    Raises:
        ConfigurationError: the test set is empty.
    """

    name = "leaks"

    def __init__(
        self,
        test: Iterable[Question],
        *,
        question_of: Callable[[T], Question],
        folder: Path | None = None,
        least: float = 0.8,
    ) -> None:
        self._question_of, self._least = question_of, least
        self._test = _TestSet(test, folder)
        self.settings: Mapping[str, Any] = {"test": self._test.digest, "questions": self._test.size, "least": least}

    def rule(self, rows: Sequence[Row[T]]) -> list[Verdict]:
        """As `Stage`."""
        questions = [self._question_of(row.value) for row in rows]
        # The rollouts of a question usually stand together, and each is looked up once.
        asked = {(question.text, images_of(question)): question for question in questions}
        verdicts = {key: self._verdict(question) for key, question in asked.items()}
        return [verdicts[question.text, images_of(question)] for question in questions]

    def _verdict(self, question: Question) -> Verdict:
        reason, id_ = self._test.leak(fingerprint(question), self._least)
        return drop(reason, f"test question {id_!r}") if reason else KEEP


class _TestSet:
    def __init__(self, questions: Iterable[Question], folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("test-*"):  # of an earlier run; what it was built from may have changed
                left.unlink()
        self._index = SimilarityIndex(folder and folder / "test-questions.sqlite")
        self._grams = sqlite3.connect(
            ":memory:" if folder is None else folder / "test-grams.sqlite",
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in ("journal_mode = OFF", "synchronous = OFF"):
            self._grams.execute(f"PRAGMA {pragma}")
        self._grams.execute("CREATE TABLE gram (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID")
        self._grams.execute("CREATE TABLE total (number INTEGER PRIMARY KEY, grams INTEGER, id TEXT)")
        digest = hashlib.sha256()
        self.size = 0
        self._index.begin_from(0)
        self._grams.execute("BEGIN")
        for number, question in enumerate(questions):
            print_ = fingerprint(question)
            self._index.add(number, question.id, print_)
            self._grams.executemany("INSERT OR IGNORE INTO gram VALUES (?, ?)", [(k, number) for k in _grams(print_)])
            self._grams.execute("INSERT INTO total VALUES (?, 0, ?)", (number, question.id))
            digest.update(json.dumps([question.id, print_.text, print_.images]).encode())
            self.size += 1
        if not self.size:
            raise ConfigurationError("the test set holds no questions; leave it out, or name another.")
        self._grams.execute(
            "DELETE FROM gram WHERE key IN (SELECT key FROM gram GROUP BY key HAVING count(*) > ?)", (_COMMON,)
        )
        self._grams.execute(
            "UPDATE total SET grams = found.n FROM (SELECT number, count(*) AS n FROM gram GROUP BY number) AS found "
            "WHERE total.number = found.number"
        )
        self._grams.execute("COMMIT")
        self._index.commit()
        self.digest = digest.hexdigest()[:16]

    def leak(self, print_: Fingerprint, least: float) -> tuple[str, str]:
        """Reason and id of the test question; two empty texts where there is none."""
        match = self._index.find(print_, least=least, same_answer=False)
        if match is not None:
            return ("asks a test question" if match.similarity == 1 else "nearly asks a test question"), match.id
        if (shared := self._index.with_image(print_)) is not None:
            return "shares an image with a test question", shared
        keys = list(_grams(print_))
        found: dict[int, int] = {}
        for start in range(0, len(keys), 500):
            part = keys[start : start + 500]
            marks = ",".join("?" * len(part))
            for (number,) in self._grams.execute(f"SELECT number FROM gram WHERE key IN ({marks})", part):
                found[number] = found.get(number, 0) + 1
        for number, count in found.items():
            total, id_ = self._grams.execute("SELECT grams, id FROM total WHERE number = ?", (number,)).fetchone()
            if count >= _CONTAINED * total:
                return "holds a test question", id_
        return "", ""


def _grams(print_: Fingerprint) -> set[int]:
    words = print_.text.split()
    return {
        int.from_bytes(
            hashlib.blake2b(
                " ".join(words[start : start + _GRAM]).encode(errors="surrogatepass"), digest_size=8
            ).digest(),
            "big",
            signed=True,
        )
        for start in range(len(words) - _GRAM + 1)
    }
