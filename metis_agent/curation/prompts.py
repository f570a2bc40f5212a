"""Prompts for RL: what is known of each question from all of its rollouts, gathered in one pass over the store.

The rollouts of a question may stand anywhere in the store, so they are counted in a local SQLite file. The count and
the place that it has reached are written in one transaction: a killed run goes on from there, and counts nothing
twice.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from metis_agent import formats
from metis_agent.curation.leaks import fingerprint, utf8
from metis_agent.errors import ConfigurationError, InfrastructureError, InputError, StorageError
from metis_agent.recording.shards import Storage
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts import questions
from metis_agent.sqlite import check_database, content_key
from metis_agent.types import Question, Trajectory

__all__ = ["Answer", "Prompt", "PromptCounts", "judged_answers", "question_line", "read_questions"]

_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question, and what came of its rollouts."""

    question: Question
    right: int = 0
    wrong: int = 0
    excluded: int = 0
    """Failed runs, and answers that could not be judged: they say nothing."""
    answers: tuple[tuple[str, bool], ...] = ()
    """A few of the answers, right ones and wrong ones, with what the verifier said."""
    fault: str = ""
    """What is wrong with the question itself, as the whole store shows."""

    @property
    def rollouts(self) -> int:
        """All of them."""
        return self.right + self.wrong + self.excluded


@dataclass(kw_only=True)
class _Counted:
    question: Question
    right: int = 0
    wrong: int = 0
    excluded: int = 0
    answers: dict[str, bool] = field(default_factory=dict)

    def add(self, answer: str, right: bool | None) -> None:
        if right is None:
            self.excluded += 1
            return
        self.right += right
        self.wrong += not right
        if answer not in self.answers and sum(it is right for it in self.answers.values()) < _SAMPLES:
            self.answers[answer] = right


Answer = tuple[Question, str, bool | None]
"""A question, what was answered, and whether that is right; `None` where nobody can say, or the run failed."""


def judged_answers(runs: Iterable[Trajectory], verify: Callable[[Question, str], bool | None]) -> Iterator[Answer]:
    """Yield each run's answer with its verdict."""
    for run in runs:
        right = None
        if run.status == "finished":
            with suppress(InfrastructureError, ConfigurationError):
                right = verify(run.question, run.answer)
        yield run.question, run.answer, right


class PromptCounts:
    """The counts of all questions of a store.

    Args:
        path: a local file.
        verify: judges the answers.
        batch: trajectories in a transaction.
    """

    def __init__(self, path: Path, *, verify: Callable[[Question, str], bool | None], batch: int = 2_000) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._verify, self._batch = verify, batch
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        check_database(self._db, str(path))
        self._db.executescript(
            "CREATE TABLE IF NOT EXISTS prompt (number INTEGER PRIMARY KEY, key TEXT UNIQUE, id TEXT, same INTEGER,"
            " reference TEXT, question TEXT, right INTEGER, wrong INTEGER, excluded INTEGER, answers TEXT);"
            "CREATE INDEX IF NOT EXISTS by_id ON prompt (id); CREATE INDEX IF NOT EXISTS by_same ON prompt (same);"
            "CREATE TABLE IF NOT EXISTS place (trajectories INTEGER);"
        )

    @property
    def trajectories(self) -> int:
        """How many are counted."""
        row = self._db.execute("SELECT trajectories FROM place").fetchone()
        return int(row[0]) if row else 0

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM prompt").fetchone()[0])

    def count(self, trajectories: Iterable[Trajectory], *, progress: Callable[[int], None] = lambda _: None) -> None:
        """Count all trajectories of a source, read from its start; those counted before are passed over."""
        left = islice(iter(trajectories), self.trajectories, None)
        self._count(judged_answers(left, self._verify), progress)

    def count_answers(self, answers: Iterable[Answer], *, progress: Callable[[int], None] = lambda _: None) -> None:
        """The same, of answers that were judged elsewhere (`judged_answers`)."""
        self._count(islice(iter(answers), self.trajectories, None), progress)

    def _count(self, answers: Iterator[Answer], progress: Callable[[int], None]) -> None:
        done = self.trajectories
        if done:
            progress(done)
        while batch := list(islice(answers, self._batch)):
            counted: dict[str, _Counted] = {}
            for question, answer, right in batch:
                counted.setdefault(_key(question), _Counted(question=question)).add(answer, right)
            done += len(batch)
            self._keep(counted, done)
            progress(done)

    def _keep(self, counted: dict[str, _Counted], done: int) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for key, entry in counted.items():
                    self._keep_one(key, entry)
                self._db.execute("DELETE FROM place")
                self._db.execute("INSERT INTO place VALUES (?)", (done,))
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise
        except sqlite3.Error as error:
            raise StorageError(f"prompts can't be counted: {error}. Make room, then run again to go on.") from error

    def _keep_one(self, key: str, entry: _Counted) -> None:
        row = self._db.execute("SELECT number, answers FROM prompt WHERE key = ?", (key,)).fetchone()
        if row is None:
            print_ = fingerprint(entry.question)
            values = (
                key, utf8(entry.question.id), print_.exact, print_.answer or None,
                question_line(entry.question),
                entry.right, entry.wrong, entry.excluded, json.dumps(list(entry.answers.items())),
            )  # fmt: skip
            self._db.execute("INSERT INTO prompt VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            return
        merged = _Counted(question=entry.question, answers=dict(json.loads(row[1])))
        for answer, right in entry.answers.items():
            merged.add(answer, right)
        self._db.execute(
            "UPDATE prompt SET right = right + ?, wrong = wrong + ?, excluded = excluded + ?, answers = ? "
            "WHERE number = ?",
            (entry.right, entry.wrong, entry.excluded, json.dumps(list(merged.answers.items())), row[0]),
        )

    def prompts(self) -> Iterator[Prompt]:
        """All prompts, in the order in which their questions were first met."""
        last = 0
        while rows := self._db.execute(
            "SELECT number, id, same, question, right, wrong, excluded, answers FROM prompt WHERE number > ? "
            "ORDER BY number LIMIT 1000",
            (last,),
        ).fetchall():
            for number, id_, same, question, right, wrong, excluded, answers in rows:
                last = number
                yield Prompt(
                    question=_parse(question), right=right, wrong=wrong, excluded=excluded,
                    answers=tuple((answer, verdict) for answer, verdict in json.loads(answers)),
                    fault=self._fault(id_, same),
                )  # fmt: skip

    def _fault(self, id_: str, same: int) -> str:
        if self._db.execute("SELECT count(DISTINCT reference) FROM prompt WHERE same = ?", (same,)).fetchone()[0] > 1:
            return "references disagree"
        if self._db.execute("SELECT count(DISTINCT same) FROM prompt WHERE id = ?", (id_,)).fetchone()[0] > 1:
            return "one id for several questions"
        return ""


def _key(question: Question) -> str:
    return content_key(question.id, question.text, question.answer, question.verifier, dict(question.metadata))


# --- questions in files -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Line(Question):
    format: int = 1


@cache
def _adapter() -> TypeAdapter[_Line]:
    return TypeAdapter(_Line)


def _parse(line: str | bytes) -> Question:
    try:
        read = _adapter().validate_json(line)
    except ValidationError as error:
        try:  # a lone surrogate is no UTF-8, and JSON has it all the same
            read = _adapter().validate_python(json.loads(line))
        except ValueError:
            raise error from None
    formats.check_number(read.format, formats.QUESTIONS, f"question {read.id!r}")
    return Question(**formats.without_format(vars(read)))


def question_line(question: Question, **metadata: object) -> str:
    """A question as a line of JSON, with further metadata."""
    if metadata:
        question = replace(question, metadata={**question.metadata, **metadata})
    line = formats.with_format(asdict(question), formats.QUESTIONS)
    return json.dumps(line, ensure_ascii=True, separators=(",", ":"))


def read_questions(url: str) -> Iterator[Question]:
    """Questions of a file (see `rollouts.questions`), of a folder as curation writes it, or of a store of trajectories.

    Raises:
        InputError: a line is neither a question nor a trajectory.
        SchemaVersionError: a newer Metis wrote it.
        StorageError: there is nothing to read.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    if name.endswith((".jsonl", ".csv", ".parquet")):
        whole = (
            name.endswith(".jsonl") and b'"metadata":' in next(_lines(Storage(folder or "."), [name]), ("", 0, b""))[2]
        )
        yield from _questions(Storage(folder or "."), [name]) if whole else questions.read_questions(url)
        return
    place = Storage(url)
    place.check_exists()
    names = sorted(file for file in place.names() if file.endswith(".jsonl"))
    if not names:
        raise StorageError(f"{url!r} holds no .jsonl file; name a file of questions, or a store of trajectories.")
    first = next(iter(_lines(place, names[:1])), (names[0], 0, b"{}"))
    if b'"schema":' in first[2][:20]:
        yield from _once(trajectory.question for trajectory in TrajectoryStore(url, read_only=True).read(whole=False))
    else:
        yield from _questions(place, names)


def _once(questions: Iterable[Question]) -> Iterator[Question]:
    """The rollouts of a question usually stand together; what is left over does no harm."""
    last = None
    for question in questions:
        if question != last:
            yield question
        last = question


def _questions(place: Storage, names: list[str]) -> Iterator[Question]:
    for name, number, line in _lines(place, names):
        try:
            yield _parse(line)
        except ValidationError as error:
            reason = error.errors(include_url=False, include_input=False)[0]
            raise InputError(
                f"{name} line {number} in {place.url!r} is no question: {reason['loc']!r} {reason['msg']}. A line is "
                'an object such as {"id": "q1", "text": "...", "answer": "..."}.'
            ) from error


def _lines(place: Storage, names: list[str]) -> Iterator[tuple[str, int, bytes]]:
    for name in names:
        rest, number = b"", 0
        for block in place.blocks(name):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield name, number, line
        if rest.strip():
            yield name, number + 1, rest
