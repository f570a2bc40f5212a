"""From trajectories in a store to an outcome table: what came of each question down each branch.

Where it stands: recorded runs -> **pooled outcomes** -> `gate_trainer` and `evaluation.gates`. A pool reads each
trajectory once and keeps a few sums a question. Of more questions than it has room for it keeps a sample: those whose
hash is smallest, which is a fair draw and the same in whatever order the store is read. So memory is bounded, however
large the store.

The branch of a run is the one that the gate chose, where it left no choice: answer, or call this tool. So forced
rollouts count, and an exploring gate's, and what a trained gate decided in service. Where the model chose, what it
did counts: no call, or calls of one tool.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import InfrastructureError, InputError
from metis_agent.gates.features import draft_log_prob_features, draft_text_features
from metis_agent.gates.reading import conversation_before, ends_of
from metis_agent.gates.reference import read_log_probs
from metis_agent.judging.rubric import shorten
from metis_agent.judging.verifiers import Verify, judged, prose
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.messages import provider_name
from metis_agent.recording.store import StoreReport, TrajectoryStore, spread
from metis_agent.rollouts.branches import branch_taken
from metis_agent.rollouts.outcomes import DIRECT, OutcomeTable, question_key
from metis_agent.rollouts.questions import CONTEXT
from metis_agent.types import Question, Trajectory

__all__ = ["MAX_QUESTIONS", "OutcomePool", "outcomes_from_trajectories", "pool_store"]

MAX_QUESTIONS = 200_000
"""Questions that a pool has room for; a gate that reads text learns little from more."""

_MAX_TOOLS = 64
"""Tools that are found by themselves; of more, those that matter are to be named."""
_STRAY = 0.05
"""A tool that was used on fewer of the questions than this, compared with the most used one, is not a branch."""

_NO_DRAFT: tuple[str, array[float], str] = "", array("d"), ""
_RUNS, _RIGHT, _COST, _SECONDS = range(4)
_DOUBTFUL_RUNS, _DOUBTFUL_SHARE, _ALL_WRONG_RUNS = 3, 0.05, 20


class OutcomePool:
    """Sums over the runs of each question and branch.

    Args:
        tools: names of the tools that the gate may choose; by default all that occur, but for strays.
        verify: judges an answer.
        use_cost: take the recorded cost of the calls; by default a run costs its number of calls.
        draft: also keep what a direct run shows of itself, as `draft_*` numbers: one direct run of each question
            stands for the draft that a deployed gate will be given.
        group_by: key of `Question.metadata` whose value keeps questions together when splitting.
        model: take only runs whose metadata names this model.
        max_questions: room; see the module.
        trust_verdicts: take verdicts that look like the verifier's fault; by default `table` refuses them.
    """

    reads_messages = False
    """Whether messages and model calls of the runs are read where no draft is."""

    def __init__(
        self,
        *,
        tools: Sequence[str] | None = None,
        verify: Verify = default_verify,
        use_cost: bool = False,
        draft: bool = False,
        group_by: str | None = None,
        model: str | None = None,
        max_questions: int = MAX_QUESTIONS,
        trust_verdicts: bool = False,
    ) -> None:
        if max_questions < 1:
            raise InputError(f"max_questions={max_questions!r}: a pool needs room for at least 1 question.")
        self._verify, self._use_cost, self._draft, self._group_by = verify, use_cost, draft, group_by
        self._model, self._room = model, max_questions
        self._fixed, self._names = tools is not None, tuple(tools or ())
        self._columns = {name: column for column, name in enumerate((DIRECT, *(tools or ())))}
        self._rows: dict[int, int] = {}
        self._largest: list[tuple[int, int]] = []  # a heap of (-hash, row): the next to go is on top
        self._sums = np.zeros((1024, 4, max(2, len(self._columns))))
        self._texts: list[str] = []
        self._contexts: list[str] = []
        self._histories: list[str] = []
        self._groups: list[str] = []
        self._drafts: dict[int, tuple[str, array[float], str]] = {}
        self._draft_names: tuple[str, ...] = ()
        self._models: set[str] = set()
        self._answered: set[str] = set()
        """Names that providers gave the models of the runs."""
        self._trusts = trust_verdicts
        self._doubted: Counter[str] = Counter()
        self._wrong: dict[str, Trajectory] = {}
        """One for each branch: an answer judged wrong that states the reference, if there is one."""
        self.runs = 0
        """Read so far, usable or not."""
        self.dropped: Counter[str] = Counter()
        """Runs that could not be used, and questions that there was no room for, by reason."""

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, run: Trajectory) -> None:
        """Count one run.

        Raises:
            InputError: it is of another model than the runs before, and none was chosen.
        """
        self.extend([run])

    def extend(self, runs: Iterable[Trajectory]) -> OutcomePool:
        """Count many, a few in memory at a time: as many as a judge is asked about at once.

        Raises:
            InputError: as `add`.
        """
        for run, right, reason in self._judged(filter(self._is_to_count, runs)):
            self._count(run, right, reason)
        return self

    def _judged(self, runs: Iterable[Trajectory]) -> Iterator[tuple[Trajectory, bool | None, str]]:
        return judged(runs, self._verify, foreign=True)

    def _count(self, run: Trajectory, right: bool | None, reason: str) -> None:
        action, unclear = branch_taken(run)
        column = self._column(action) if action else None
        if right is None or column is None:
            self.dropped[(reason if right is None else unclear) or "another tool"] += 1
            return
        row = self._row(run.question, conversation_before(run.history))
        if row is None:
            return
        if not right:
            self._doubt(action, run)
        price = run.cost if self._use_cost else run.tool_calls
        self._sums[row, :, column] += 1.0, float(right), price, run.seconds
        if self._draft and column == 0:
            self._keep_draft(row, run)

    def _doubt(self, action: str, run: Trajectory) -> None:
        """Take note of an answer that was judged wrong: it may well say what the reference says."""
        says_it = bool(prose(run.question, run.answer))
        self._doubted[action] += says_it
        if (says_it and self._doubted[action] == 1) or action not in self._wrong:
            self._wrong[action] = run

    def _check_verdicts(self, counts: Mapping[str, tuple[float, float]]) -> None:
        """Refuse verdicts that look like the verifier's fault: a gate would learn from them, and promise by them.

        Args:
            counts: Answers of each branch, and how many are right.

        Raises:
            InputError: every answer of every branch is wrong, or many a wrong one states the reference.
        """
        if self._trusts:
            return
        for action, (runs, _) in counts.items():
            doubted = self._doubted[action]
            if runs and doubted >= max(_DOUBTFUL_RUNS, _DOUBTFUL_SHARE * runs):
                said = f"{doubted} of {runs:.0f} answers of branch {action!r} are judged wrong and yet state the "
                raise InputError(_verdicts_in_doubt(f"{said}reference", self._wrong[action]))
        runs, right = (sum(column) for column in zip(*counts.values(), strict=True))
        if runs >= _ALL_WRONG_RUNS and not right and self._wrong:
            said = f"All {runs:.0f} answers, of every branch, are judged wrong"
            raise InputError(_verdicts_in_doubt(said, next(iter(self._wrong.values()))))

    def merge(self, other: OutcomePool) -> OutcomePool:
        """Count what another pool of the same settings has counted.

        Raises:
            InputError: as `add`.
        """
        for model in other._models:
            self._is_of_the_model(model)
        columns = [(self._column(name), column) for name, column in other._columns.items()]
        for key, theirs in sorted(other._rows.items()):
            said = other._texts[theirs], other._contexts[theirs], other._histories[theirs], other._groups[theirs]
            row = self._place(key, *said)
            if row is None:
                continue
            for mine, column in columns:
                if mine is None:
                    self.dropped["another tool"] += int(other._sums[theirs, _RUNS, column])
                else:
                    self._sums[row, :, mine] += other._sums[theirs, :, column]
            if theirs in other._drafts and (row not in self._drafts or other._drafts[theirs][0] < self._drafts[row][0]):
                self._drafts[row] = other._drafts[theirs]
        self._draft_names = max(self._draft_names, other._draft_names, key=len)
        self._add_counts(other)
        return self

    def _add_counts(self, other: OutcomePool) -> None:
        self._wrong = {**other._wrong, **self._wrong}
        self._answered |= other._answered
        self._doubted.update(other._doubted)
        self.dropped.update(other.dropped)
        self.runs += other.runs

    def coverage(self) -> dict[str, int]:
        """Questions with at least one run, by branch."""
        counts = (self._sums[list(self._rows.values()), _RUNS] > 0).sum(axis=0)
        return {name: int(counts[column]) for name, column in self._columns.items()}

    def table(self) -> OutcomeTable:
        """The questions that have every branch, in the order of their hashes.

        Raises:
            InputError: there is none, or the verdicts look like the verifier's fault.
            InfrastructureError: there is none, for want of a judge.
        """
        totals = self._sums[list(self._rows.values())].sum(axis=0)
        self._check_verdicts({name: (totals[_RUNS, at], totals[_RIGHT, at]) for name, at in self._columns.items()})
        tools, strays = self._tools()
        actions = (DIRECT, *(tools if self._fixed else sorted(tools)))
        columns = [self._columns[name] for name in actions]
        rows = np.array([row for _, row in sorted(self._rows.items())], dtype=np.int64)
        sums = self._sums[rows][:, :, columns]
        whole = (sums[:, _RUNS] > 0).all(axis=1)
        dropped = {**self.dropped, "question without all branches": int((~whole).sum())}
        dropped["another tool"] = dropped.get("another tool", 0) + strays
        if not whole.any() and self.dropped["no reference"]:
            raise InputError(
                f"{self.dropped['no reference']} of {self.runs} runs have no reference answer, so nobody knows "
                "which were right. Find out what their calls changed (`metis audit --points FILE`) and "
                "train on that (`metis train gate --outcomes FILE`), or name a judge or --agreement."
            )
        if (unjudged := dropped.get("judge unavailable", 0)) and not whole.any():
            raise InfrastructureError(
                f"The judge gave no verdict on {unjudged} of {self.runs} runs, and without them no question has a "
                "verdict down every branch. Check its name, its key and its server, and run the same again: nothing "
                "has to be recorded again."
            )
        if not whole.any() or not tools:
            raise InputError(
                f"None of {len(rows)} questions was recorded down every branch; questions by branch: "
                f"{self.coverage()!r}, left out: {dict(self.dropped)!r}. Record each question without a tool and with "
                "each tool (`metis rollout`), or name only the tools that were recorded."
            )
        rows, sums = rows[whole], sums[whole]
        means = sums[:, 1:] / sums[:, :1]
        return OutcomeTable(
            questions=tuple(self._texts[row] for row in rows),
            actions=actions,
            correct=means[:, _RIGHT - 1],
            cost=means[:, _COST - 1],
            seconds=means[:, _SECONDS - 1],
            contexts=tuple(self._contexts[row] for row in rows) if any(self._contexts) else (),
            histories=tuple(self._histories[row] for row in rows) if any(self._histories) else (),
            groups=tuple(self._groups[row] for row in rows) if self._group_by else (),
            draft=self._draft_columns(rows),
            drafts=tuple(self._drafts.get(int(row), _NO_DRAFT)[2] for row in rows) if self._drafts else (),
            models=tuple(sorted(self._answered)),
            dropped={reason: count for reason, count in dropped.items() if count},
        )

    def _tools(self) -> tuple[list[str], int]:
        """The tools that are branches, and how many runs are of others: a stray call must not cost all questions."""
        questions = self.coverage()
        tools = [name for name in questions if name != DIRECT]
        if self._fixed or not tools:
            return tools, 0
        least = _STRAY * max(questions[name] for name in tools)
        kept = [name for name in tools if questions[name] >= least]
        rows = list(self._rows.values())
        runs = self._sums[rows, _RUNS].sum(axis=0)
        return kept, int(sum(runs[self._columns[name]] for name in tools if name not in kept))

    def _is_to_count(self, run: Trajectory) -> bool:
        self.runs += 1
        if self._is_of_the_model(run.metadata.get("model")):
            self._answered.update(model_names(run))
            return True
        self.dropped["another model"] += 1
        return False

    def _is_of_the_model(self, name: object) -> bool:
        if self._model is not None:
            return bool(name == self._model)
        if isinstance(name, str) and name not in self._models:
            self._models.add(name)
            if len(self._models) > 1:
                raise InputError(
                    f"The store holds runs of the models {sorted(self._models)!r}: outcomes of one say nothing of "
                    "another. Choose one with --of-model."
                )
        return True

    def _column(self, action: str) -> int | None:
        column = self._columns.get(action)
        if column is None and not self._fixed and len(self._columns) <= _MAX_TOOLS:
            column = self._columns[action] = len(self._columns)
            if column >= self._sums.shape[2]:
                self._sums = np.pad(self._sums, ((0, 0), (0, 0), (0, column)))
        return column

    def _row(self, question: Question, history: str) -> int | None:
        """Where the question's sums are; `None` where there is no room for it."""
        said = self._said(question, history)
        return None if said is None else self._place(int(question_key(*said[:3]), 16), *said)

    def _said(self, question: Question, history: str) -> tuple[str, str, str, str] | None:
        """Text, context, conversation and group of a question; `None` of a blank one."""
        context = str(question.metadata.get(CONTEXT) or "")
        text = question.text.removeprefix(context).lstrip() if context else question.text
        if not text.strip():
            self.dropped["blank question"] += 1
            return None
        group = str(question.metadata.get(self._group_by, "")) if self._group_by else ""
        if self._group_by and not group:
            raise InputError(
                f"Question {question.id!r} has no {self._group_by!r} in its metadata, {sorted(question.metadata)!r}: "
                "--group-by names a column of the questions' file."
            )
        return text, context, history, group

    def _place(self, key: int, text: str, context: str, history: str, group: str) -> int | None:
        if key in self._rows:
            return self._rows[key]
        if len(self._rows) < self._room:
            row = len(self._texts)
            if row >= len(self._sums):
                self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
            self._texts.append(text)
            self._contexts.append(context)
            self._histories.append(history)
            self._groups.append(group)
        else:
            self.dropped["no room for the question"] += 1
            if key > -self._largest[0][0]:
                return None
            largest, row = heapq.heappop(self._largest)
            del self._rows[-largest]
            self._sums[row] = 0.0
            self._drafts.pop(row, None)
            self._texts[row], self._contexts[row], self._groups[row] = text, context, group
            self._histories[row] = history
        self._rows[key] = row
        heapq.heappush(self._largest, (-key, row))
        return row

    def _keep_draft(self, row: int, run: Trajectory) -> None:
        # One run, not a mean: a deployed gate sees one draft. The smallest id, so that the order does not matter.
        if row in self._drafts and self._drafts[row][0] <= run.id:
            return
        call = run.calls[-1] if run.calls else None
        log_probs = read_log_probs(call.log_probs, call.allowed_log_probs, call.forced) if call else ()
        numbers = {**draft_text_features(self._texts[row], run.answer), **draft_log_prob_features(log_probs)}
        if len(numbers) > len(self._draft_names):
            self._draft_names = tuple(numbers)
        self._drafts[row] = run.id, array("d", numbers.values()), ends_of(run.answer)

    def _draft_columns(self, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        width = len(self._draft_names)
        values = np.full((len(rows), width), np.nan)
        for place, row in enumerate(rows):
            _, numbers, _ = self._drafts.get(int(row), _NO_DRAFT)
            values[place, : len(numbers)] = numbers
        columns: dict[str, Any] = dict(zip(self._draft_names, values.T, strict=True))
        return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def model_names(run: Trajectory) -> set[str]:
    """Names, with their versions, that a run's replies give their model."""
    replies = (record.get("data") for record in run.messages if record.get("type") == "ai")
    said = {provider_name(reply.get("response_metadata") or {}) for reply in replies if isinstance(reply, Mapping)}
    return {*said, *(call.model for call in run.calls)} - {""}


def _verdicts_in_doubt(said: str, run: Trajectory) -> str:
    return (
        f"{said}, such as {shorten(run.answer, 200)!r} for {run.question.answer!r}. That looks like the fault of the "
        f"verifier {run.question.verifier!r}, or of the references. Judge the same runs again, by what finds an answer "
        "in a sentence (--verifier prose) or by a model (--verifier judge --judge MODEL); nothing has to be recorded "
        f"again. To take the verdicts as they are, name their verifier: --verifier {run.question.verifier}."
    )


def pool_store(
    url: str,
    *,
    kind: type[OutcomePool] = OutcomePool,
    verify: Callable[[], Verify] = lambda: default_verify,
    ray: str | None = None,
    progress: Callable[[StoreReport], None] = lambda _: None,
    **options: Any,
) -> OutcomePool:
    """The outcomes of a store, pooled shard by shard; the same here and on a Ray cluster.

    Args:
        url: Of the store; on a cluster all its machines must see it.
        kind: The pool: of questions, or a `PointPool`.
        verify: Makes what judges answers, once in each process.
        ray: See `recording.store`.
        progress: Called after each shard, with what was met in it.
        **options: Of the pool.

    Raises:
        InputError: as `OutcomePool.add`.
        StorageError: it can't be read.
    """
    whole = kind(verify=default_verify, **options)
    shards = TrajectoryStore(url, read_only=True).shards()
    for made in spread(partial(_pooled, kind=kind, url=url, verify=verify, options=options), shards, ray=ray):
        for pool, report in made:
            whole.merge(pool)
            progress(report)
    return whole


def _pooled(
    shard: str, *, kind: type[OutcomePool], url: str, verify: Callable[[], Verify], options: Mapping[str, Any]
) -> Iterator[tuple[OutcomePool, StoreReport]]:
    store = TrajectoryStore(url, read_only=True)
    pool = kind(verify=verify(), **options)
    pool.extend(store.read(only_shard=shard, whole=pool.reads_messages or bool(options.get("draft"))))
    pool._verify = default_verify  # a judge stays where it is
    yield pool, store.report


def outcomes_from_trajectories(runs: Iterable[Trajectory], **options: Any) -> OutcomeTable:
    """Build a table from recorded runs, for example `TrajectoryStore(...).read()`.

    Args:
        runs: Read once, one in memory at a time.
        **options: Of `OutcomePool`.

    Raises:
        InputError: no question has all branches.
    """
    return OutcomePool(**options).extend(runs).table()
