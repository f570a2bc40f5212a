"""Stage `leaks`: training keeps away from the test set.

Dropped is what asks a test question again, exactly or nearly, whatever answer it gives; what holds most of a longer
test question's word 13-grams; and, where questions have images, what shares one with a test question.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from metis_agent.curation.similarity import Fingerprint, SimilarityIndex, fingerprint, images_of
from metis_agent.curation.stage import KEEP, Row, Verdict, drop
from metis_agent.errors import ConfigurationError
from metis_agent.types import Question

__all__ = ["LeaksStage", "leak_of"]

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


def leak_of(question: Question, test: Iterable[Question]) -> str:
    """Why a question leaks from a test set; empty where it does not. For a few questions, not for many."""
    return _TestSet(test, None).leak(fingerprint(question), 0.8)[0]


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
