"""The report's figures: a store as columns of numbers, and what an agent did on its questions.

A store is read once, run by run, and nothing of a run's text is kept: some sixty bytes each. So a store of a hundred
thousand trajectories takes a few megabytes, and several times that for its questions' ids.

The words mean what they mean in `evaluation.agents`: a question is *known* where all of its forced-direct runs are
right, *necessary* where none is and at least half of its forced-tool runs are; a call is redundant on a known question.
Means are over questions, so one that was asked often counts once, with 95% intervals:

- Percentile bootstrap over questions, 1,000 resamples; from 5,000 questions on the normal approximation, which is then
  the same to the digits shown.
- A share that was the same on every question has no bootstrap interval worth the name: [0, 0] of 20 questions would
  read as a promise. There the exact (Clopper-Pearson) bound stands: after n questions without an exception, a rate
  of exceptions up to 1 - 0.025^(1/n) is compatible with what was seen.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.evaluation.agents import Estimate
from metis_agent.judging.verifiers import Verify, judge
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.rollouts.branches import branch_of
from metis_agent.types import ToolOutcome, Trajectory

__all__ = [
    "AMOUNTS",
    "BRANCHES",
    "FAILED",
    "RIGHT",
    "SHARES",
    "UNJUDGED",
    "WRONG",
    "Agent",
    "Change",
    "RunTable",
    "ToolUse",
    "agent_of",
    "branch_figures",
    "changes",
    "difference_of_means",
    "labels",
    "mean_of",
    "wilson",
]

BRANCHES = ("free", "direct", "tool")
WRONG, RIGHT, UNJUDGED, FAILED = 0, 1, 2, 3
"""What a run's answer was; failed runs say nothing of the model."""


@dataclass(kw_only=True)
class ToolUse:
    """One tool, over the runs that were not forced."""

    runs: int = 0
    """Runs in which it was executed."""
    calls: int = 0
    """Executed calls."""
    seconds: float = 0.0
    cost: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    """Of all calls that were asked for, executed or not."""


class RunTable:
    """One row a run; `add` them in the order of the store.

    Args:
        verify: Judges an answer.
    """

    def __init__(self, verify: Verify = default_verify) -> None:
        self._verify = verify
        self._questions: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._tools: dict[str, int] = {}
        self._sets: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._kind_of = array("i")
        self._whole = {name: array("i") for name in ("question", "branch", "verdict", "called", "calls")}
        self._real = {name: array("d") for name in ("seconds", "tool_seconds", "cost", "started")}
        self.tool_sets: list[tuple[int, ...]] = []
        """Which tools each run executed, as places in `tools`."""
        self.tool_use: dict[str, ToolUse] = {}
        self.unjudged: Counter[str] = Counter()
        """Why finished runs could not be judged."""
        self.shadowed = 0
        """Runs in which a gate watched without deciding."""

    def __len__(self) -> int:
        return len(self._whole["question"])

    @property
    def questions(self) -> Sequence[str]:
        """Ids, in the order in which they came."""
        return list(self._questions)

    @property
    def kinds(self) -> Sequence[str]:
        """Kinds of question, in the order in which they came."""
        return list(self._kinds)

    @property
    def tools(self) -> Sequence[str]:
        """Tools that were asked for, in the order in which they came."""
        return list(self._tools)

    @property
    def kind_of(self) -> NDArray[np.int32]:
        """[N]: each question's kind, as a place in `kinds`."""
        return np.array(self._kind_of, dtype=np.int32)

    def column(self, name: str) -> NDArray[np.int32]:
        """[R]: "question", "branch" (a place in `BRANCHES`), "verdict", "called" (0 or 1) or "calls" (T)."""
        return np.array(self._whole[name], dtype=np.int32)

    def amount(self, name: str) -> NDArray[np.float64]:
        """[R]: "seconds", "tool_seconds", "cost" or "started"."""
        return np.array(self._real[name], dtype=np.float64)

    def add(self, run: Trajectory) -> None:
        """Take in one run."""
        question = self._questions.setdefault(run.question.id, len(self._questions))
        if question == len(self._kind_of):
            self._kind_of.append(self._kinds.setdefault(run.question.kind, len(self._kinds)))
        executed = [outcome for outcome in run.outcomes if outcome.executed]
        row = {
            "question": question, "branch": BRANCHES.index(run.branch), "verdict": self._verdict(run),
            "called": int(branch_of(run) == "tool"), "calls": len(executed),
        }  # fmt: skip
        for name, number in row.items():
            self._whole[name].append(number)
        amounts = (run.seconds, sum(outcome.seconds for outcome in executed), run.cost, run.started_at)
        for amount, column in zip(amounts, self._real.values(), strict=True):
            column.append(amount)
        for outcome in run.outcomes:
            self._tools.setdefault(outcome.tool, len(self._tools))
        used = tuple(sorted({self._tools[outcome.tool] for outcome in executed}))
        self.tool_sets.append(self._sets.setdefault(used, used))
        self.shadowed += any(decision.shadow for decision in run.decisions)
        if run.branch == "free" and run.status == "finished":
            self._count_tools(run.outcomes)

    def _verdict(self, run: Trajectory) -> int:
        if run.status == "failed":
            return FAILED
        try:
            right, reason = judge(run, self._verify)
        except MissingDependencyError:
            right, reason = None, f"the verifier {run.question.verifier!r} needs an extra that is not installed"
        except ConfigurationError:
            right, reason = None, f"the verifier {run.question.verifier!r} is not at hand here"
        if right is None:
            self.unjudged[reason] += 1
            return UNJUDGED
        return RIGHT if right else WRONG

    def _count_tools(self, outcomes: Sequence[ToolOutcome]) -> None:
        for name in {outcome.tool for outcome in outcomes}:
            use = self.tool_use.setdefault(name, ToolUse())
            mine = [outcome for outcome in outcomes if outcome.tool == name]
            ran = [outcome for outcome in mine if outcome.executed]
            use.runs += bool(ran)
            use.calls += len(ran)
            use.seconds += sum(outcome.seconds for outcome in ran)
            use.cost += sum(outcome.cost for outcome in ran)
            use.statuses.update(outcome.status for outcome in mine)


SHARES = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall")
AMOUNTS = ("calls", "seconds", "tool_seconds", "cost")
LABELS = ("redundant", "wrong_direct", "missed", "harmful", "wrong", "failed")
"""What a run can be filtered by; see `labels`."""

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Agent:
    """One agent on N questions: its mean on each, NaN where a question does not count."""

    questions: tuple[str, ...]
    kinds: tuple[str, ...]
    """[N], each question's."""
    columns: dict[str, Float]
    """[N] for each of `SHARES` and `AMOUNTS`."""
    runs: int
    busy: float
    """Seconds in which at least one run was under way."""

    def estimate(self, name: str, chosen: Bool | None = None) -> Estimate:
        """The mean of a column, over the chosen questions."""
        values = self.columns[name] if chosen is None else self.columns[name][chosen]
        return mean_of(values, low=0.0, high=1.0) if name in SHARES else mean_of(values)

    def of_kind(self, kinds: frozenset[str]) -> Bool:
        """[N]: the question is of one of these kinds."""
        return np.array([kind in kinds for kind in self.kinds], dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One quantity before and after; `difference` is paired where both met the same questions."""

    before: Estimate
    after: Estimate
    difference: Estimate


def agent_of(table: RunTable, branch: str = "free") -> Agent | None:
    """The agent of a store's free runs (or of those forced down a branch); `None` where there are none."""
    rows = _rows_of(table, branch)
    if not rows.any():
        return None
    question, verdict = table.column("question")[rows], table.column("verdict")[rows]
    asked, place = np.unique(question, return_inverse=True)
    judged = verdict < UNJUDGED
    with np.errstate(invalid="ignore"):
        accuracy = np.bincount(place, (verdict == RIGHT) & judged) / np.bincount(place, judged)
    runs = np.bincount(place)
    columns = {"accuracy": accuracy, "tool_rate": np.bincount(place, table.column("called")[rows]) / runs}
    known, necessary = (flag[asked] for flag in _need(table))
    columns["redundant_rate"] = np.where(known, columns["tool_rate"], np.nan)
    columns["necessary_recall"] = np.where(necessary, columns["tool_rate"], np.nan)
    columns["calls"] = np.bincount(place, table.column("calls")[rows]) / runs
    for name in AMOUNTS[1:]:
        columns[name] = np.bincount(place, table.amount(name)[rows]) / runs
    ids, kinds, kind_of = table.questions, table.kinds, table.kind_of
    return Agent(
        questions=tuple(ids[index] for index in asked),
        kinds=tuple(kinds[kind_of[index]] for index in asked),
        columns=columns,
        runs=int(rows.sum()),
        busy=_busy(table.amount("started")[rows], table.amount("seconds")[rows]),
    )


def branch_figures(table: RunTable) -> dict[str, dict[str, Estimate]]:
    """Accuracy, calls and seconds of the free runs and of those forced down each branch."""
    agents = {branch: agent_of(table, branch) for branch in BRANCHES}
    names = ("accuracy", "calls", "seconds", "cost")
    return {
        branch: {name: agent.estimate(name) for name in names} for branch, agent in agents.items() if agent is not None
    }


def changes(before: Agent, after: Agent, kinds: frozenset[str] | None = None) -> tuple[dict[str, Change], bool]:
    """Every quantity before and after, and whether it is over the same questions.

    Args:
        before: What it is compared with.
        after: What is reported on.
        kinds: Only questions of these kinds.

    Returns:
        By name; where the two share questions, only those count, and differences are paired.
    """
    place = {question: index for index, question in enumerate(before.questions)}
    shared = [(place[question], index) for index, question in enumerate(after.questions) if question in place]
    paired = bool(shared)
    earlier, later = np.arange(len(before.questions)), np.arange(len(after.questions))
    if paired:
        earlier, later = (np.array(side) for side in zip(*shared, strict=True))
    if kinds is not None:
        inside = after.of_kind(kinds)[later]
        later, earlier = later[inside], earlier[inside] if paired else earlier[before.of_kind(kinds)[earlier]]
    return {name: _change(name, before.columns[name][earlier], after.columns[name][later], paired) for name in
            SHARES + AMOUNTS}, paired  # fmt: skip


def _change(name: str, before: Float, after: Float, paired: bool) -> Change:
    low, high = (0.0, 1.0) if name in SHARES else (-math.inf, math.inf)
    was, now = mean_of(before, low=low, high=high), mean_of(after, low=low, high=high)
    # Which questions are known is a fact about each model, so those two rates can't be paired.
    if paired and name not in ("redundant_rate", "necessary_recall"):
        return Change(before=was, after=now, difference=mean_of(after - before, low=-high, high=high))
    return Change(before=was, after=now, difference=difference_of_means(was, now))


def labels(table: RunTable) -> dict[str, Bool]:
    """[R] each: the runs that a reader looks for; `harmful` is the part of `redundant` that ended wrong."""
    known, necessary = (flag[table.column("question")] for flag in _need(table))
    called, verdict = table.column("called") == 1, table.column("verdict")
    wrong, done = verdict == 0, verdict != FAILED
    return {
        "redundant": done & called & known,
        "wrong_direct": ~called & wrong,
        "missed": done & ~called & necessary,
        "harmful": called & known & wrong,
        "wrong": wrong,
        "failed": ~done,
    }


def _rows_of(table: RunTable, branch: str) -> Bool:
    rows = (table.column("branch") == BRANCHES.index(branch)) & (table.column("verdict") != FAILED)
    if branch == "free":
        return np.asarray(rows)
    # A forced run that did not take its branch says nothing of it.
    return np.asarray(rows & ((table.column("called") == 1) == (branch == "tool")))


def _need(table: RunTable) -> tuple[Bool, Bool]:
    """[N] each: the question is known; it is necessary to call. Both false where its branches were not recorded."""
    n = len(table.questions)
    right_of = {}
    for branch in ("direct", "tool"):
        rows = _rows_of(table, branch) & (table.column("verdict") < UNJUDGED)
        question = table.column("question")[rows]
        with np.errstate(invalid="ignore"):
            right_of[branch] = np.bincount(question, table.column("verdict")[rows], minlength=n) / np.bincount(
                question, minlength=n
            )
    direct, tool = right_of["direct"], right_of["tool"]
    return direct >= 1, (direct <= 0) & (tool >= 0.5)


def _busy(started: Float, seconds: Float) -> float:
    with np.errstate(over="ignore", invalid="ignore"):  # a record may say anything
        ended = started + seconds
    known = np.flatnonzero(np.isfinite(started) & np.isfinite(ended))
    order = known[np.argsort(started[known])]
    start, end = started[order], ended[order]
    reached = np.maximum.accumulate(end)
    earlier = np.concatenate([[-np.inf], reached[:-1]])
    return float(np.maximum(0.0, end - np.maximum(start, earlier)).sum())


RESAMPLES = 1000
MANY = 5000
_Z = 1.959963984540054


def mean_of(values: NDArray[np.float64], *, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The mean of the values that are numbers.

    Args:
        values: [N], one a question, NaN where it does not count.
        low: Below which no value can be.
        high: Above which none can be; with `low` it bounds what was the same everywhere.
    """
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return Estimate(value=None, low=None, high=None, questions=0)
    mean = float(values.mean())
    if float(np.ptp(values)) == 0:
        # The largest change that a share of exceptions not seen in n questions could make.
        width = (1 - 0.025 ** (1 / n)) * (high - low) if math.isfinite(high - low) else 0.0
        bottom, top = max(low, mean - width), min(high, mean + width)
    elif n >= MANY:
        error = _Z * float(values.std(ddof=1)) / math.sqrt(n)
        bottom, top = mean - error, mean + error
    else:
        bottom, top = (float(edge) for edge in np.percentile(_resampled(values), [2.5, 97.5]))
    return Estimate(value=mean, low=bottom, high=top, questions=n)


def difference_of_means(before: Estimate, after: Estimate) -> Estimate:
    """Mean `after` less mean `before`, measured apart; its interval is made of theirs (MOVER, Zou and Donner 2008)."""
    if before.value is None or after.value is None:
        return Estimate(value=None, low=None, high=None, questions=0)
    mean = after.value - before.value
    down = math.hypot(after.value - (after.low or 0.0), (before.high or 0.0) - before.value)
    up = math.hypot((after.high or 0.0) - after.value, before.value - (before.low or 0.0))
    return Estimate(value=mean, low=mean - down, high=mean + up, questions=before.questions + after.questions)


def wilson(share: float, n: float) -> tuple[float, float]:
    """95% interval of a share seen in n independent questions."""
    if n <= 0:
        return 0.0, 1.0
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(values)
    return np.asarray(np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ values / n)
