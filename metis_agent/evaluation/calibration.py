"""A gate's threshold for a promise in the user's words, with a finite-sample guarantee; and a check for drift.

Where it stands: a trained gate and records that it was *not* trained on -> a threshold for its `gate.json`.

A promise is on a mean over questions of a bounded loss L(threshold): accuracy lost against always calling,
calls, or cost. Thresholds are tested in an order fixed beforehand, from the one that keeps the promise for
certain, each null hypothesis "the mean loss exceeds the limit" at level delta, up to the first that can't be
rejected: the error over the whole sequence is then at most delta, though losses need not be monotone (Learn
Then Test, arXiv:2110.01052, fixed-sequence testing). Each p-value is of a test by betting (Waudby-Smith and
Ramdas, arXiv:2010.09686): valid at every sample size, and narrow where most losses are 0; with replacement for the long
run, without for the records that come next. Questions that came together, say those about one table, win and lose
together: then it is the groups that count as drawn independently.

What is bounded is the chance that the threshold was chosen although its *long-run mean* breaks the limit, for
questions drawn like those calibrated on; `drift` tests for that, in service and without outcomes, by the scores that
were kept with the gate. The mean over the next few hundred questions scatters around the long-run mean, so it may break
the limit a little more often. `ahead` bounds that as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, hypergeom, ks_2samp

from metis_agent.errors import CheckpointError, ConfigurationError, InputError
from metis_agent.evaluation.gates import Scored, replay
from metis_agent.gates.artefact import Artefact
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = [
    "Drift",
    "Promise",
    "Threshold",
    "choose_threshold",
    "drift",
    "drift_since_calibration",
    "exceeds_p_value",
    "reference_note",
]

PromiseKind = Literal["accuracy_loss", "calls", "cost"]

GRID = 1 / (1 + np.exp(-np.linspace(-8, 8, 321)))
"""Thresholds tried; fixed before any record is seen."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """At most `limit` with confidence 1 - `delta`.

    - "accuracy_loss": accuracy lost against always calling the tool, such as 0.01.
    - "calls": share of questions on which a tool is called.
    - "cost": mean cost a question, in the unit of the cost columns; no record may cost more than `highest`.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    kind: PromiseKind
    limit: float
    delta: float = 0.05
    highest: float | None = None
    """For "cost": what a question can cost at most; needed, for a mean without an upper bound can't be
    promised."""

    def __post_init__(self) -> None:
        if self.kind not in ("accuracy_loss", "calls", "cost"):
            raise ConfigurationError(f"kind={self.kind!r}: choose 'accuracy_loss', 'calls' or 'cost'.")
        if not 0 < self.delta < 1:
            raise ConfigurationError(f"delta={self.delta!r}: 1 - confidence, between 0 and 1, such as 0.05.")
        top = 1.0 if self.kind != "cost" else math.inf
        if not 0 <= self.limit < top:
            raise ConfigurationError(f"limit={self.limit!r}: for {self.kind!r} at least 0 and below {top}.")
        if self.kind == "cost" and not (self.highest and 0 < self.highest < math.inf):
            raise ConfigurationError(f"highest={self.highest!r}: say what a question can cost at most.")


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The threshold that keeps a promise, and what it looked like on the calibration records."""

    value: float
    promise: Promise
    rows: int
    groups: int
    """Of questions that came together; as many as rows where each was on its own."""
    ahead: int | None
    """How many coming questions (groups, where there are any) the promise covers beside the long run."""
    mean: float
    """Of the promised quantity, on the calibration records."""
    tool_rate: float
    accuracy: float
    unit: Literal["question", "turn"] = "question"

    def note(self) -> dict[str, object]:
        """For `gate.json`."""
        chosen = (
            f"{self.promise.kind} at most {self.promise.limit} with confidence {1 - self.promise.delta:g}, "
            f"learn-then-test on {self.rows} held-out {self.unit}s"
        )
        if self.groups < self.rows:
            chosen += f" in {self.groups} groups"
        if self.ahead is not None:
            chosen += f", also over the next {self.ahead} {'groups' if self.groups < self.rows else f'{self.unit}s'}"
        return {
            "value": self.value, "chosen": chosen, "rows": self.rows, "groups": self.groups, "ahead": self.ahead,
            "mean": self.mean, "tool_rate": self.tool_rate, "accuracy": self.accuracy,
        }  # fmt: skip


def choose_threshold(
    probabilities: NDArray[np.float64],
    correct: NDArray[np.float64],
    cost: NDArray[np.float64],
    promise: Promise,
    *,
    groups: Sequence[object] = (),
    ahead: int | None = None,
    seed: int = 0,
    points: OutcomeTable | None = None,
) -> Threshold:
    """The threshold nearest to the user's wish of those certified to keep the promise.

    For a promised accuracy that is the one with the fewest calls, for promised calls or cost the one with the
    most.

    Args:
        probabilities: [N, A - 1], the gate's, for questions that it was not trained on.
        correct: [N, A].
        cost: [N, A].
        promise: To keep.
        groups: [N], questions that came together (of one table, say) and may be won or lost together: then the groups
            count as independent, not the questions in them. Without any, each question is on its own.
        ahead: Keep the promise over the next so many questions as well (groups, where there are any), not in
            the long run alone.
        seed: Of the order in which records are bet on.
        points: For decision points, their table: the promise is then by turn, "always" is the run as it was, and the
            steps of a turn, and turns that are drawn together, count as one record. Not for promised calls.

    Raises:
        ConfigurationError: calls are promised by turn.
        InputError: the records can't support the promise: only the trivial threshold could be certified.
    """
    n = len(correct)
    if n == 0 or probabilities.shape != (n, correct.shape[1] - 1):
        raise InputError(
            f"probabilities is {probabilities.shape!r} and correct {correct.shape!r}: need [N, A - 1], N > 0."
        )
    if len(groups) not in (0, n):
        raise InputError(f"groups has {len(groups)} entries for {n} questions: one each.")
    if ahead is not None and ahead < 1:
        raise ConfigurationError(f"ahead={ahead!r}: how many coming questions, at least 1.")
    if points is not None and promise.kind == "calls":
        raise ConfigurationError(
            "Calls by turn have no upper bound of themselves: promise their cost, and the highest."
        )
    turns = replay(points, np.ones(n, dtype=bool)).homes if points is not None else ()
    pool = _Pool.of(turns or groups or np.arange(n))
    order = np.random.default_rng(seed).permutation(len(pool.size))
    tool = probabilities.argmax(axis=1)
    best, rows = probabilities[np.arange(n), tool], np.arange(n)
    from_always = promise.kind == "accuracy_loss"
    found: float | None = None
    tested: NDArray[np.bool_] | None = None
    for value in GRID if from_always else GRID[::-1]:
        called = best > value
        if tested is None or bool((called != tested).any()):
            losses, limit = _losses(promise, called, correct, cost, rows, tool, points)
            if pool.p_value(losses, limit, order, ahead) > promise.delta:
                break
        tested, found = called, float(value)
    called = best > (found if found is not None else (0.0 if from_always else 1.0))
    trivial = called.all() if from_always else not called.any()
    if found is None or trivial:
        raise InputError(_refusal(promise, n, len(pool.size), ahead))
    chosen = np.where(called, tool + 1, 0)
    losses, _ = _losses(promise, called, correct, cost, rows, tool, points)
    accuracy = float(correct[rows, chosen].mean()) if points is None else float(replay(points, called).correct.mean())
    mean = float(losses.mean())
    if from_always:
        mean = 2 * mean - 1
    elif promise.kind == "cost":
        mean *= float(promise.highest or 1)
    return Threshold(
        value=found, promise=promise, rows=len(losses), groups=len(pool.size), ahead=ahead, mean=mean,
        tool_rate=float(called.mean()), accuracy=accuracy,
        unit="question" if points is None else "turn",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Which questions came together."""

    place: NDArray[np.int64]
    """[N]: the group of each question."""
    size: NDArray[np.int64]
    """[groups]."""

    @classmethod
    def of(cls, groups: Sequence[object] | NDArray[np.int64]) -> _Pool:
        _, place = np.unique(np.asarray(groups), return_inverse=True)
        return cls(place=place, size=np.bincount(place))

    def p_value(self, losses: NDArray[np.float64], limit: float, order: NDArray[np.int64], ahead: int | None) -> float:
        """Of "the mean is above the limit", in the long run or in those ahead, whichever is surer.

        Args:
            losses: [N], of the questions.
            limit: Of their mean.
            order: [groups], in which they are bet on.
            ahead: See `choose_threshold`.
        """
        # What a group's questions lost over the limit, over the most that there are in one: still in [0, 1], and
        # below the limit on average just where the questions' losses are.
        most = int(self.size.max())
        whole = limit + np.bincount(self.place, losses - limit) / most if most > 1 else losses[np.argsort(self.place)]
        # A group that loses all of its questions is far rarer than a question lost: bets may be bolder.
        guess, boldest = 0.25 * float(self.size.mean()) / most**2, 0.9 if most > 1 else 0.75
        test = partial(exceeds_p_value, whole[order], limit, guess=guess, boldest=boldest)
        return test() if ahead is None else max(test(), test(ahead=ahead))


def _losses(
    promise: Promise,
    called: NDArray[np.bool_],
    correct: NDArray[np.float64],
    cost: NDArray[np.float64],
    rows: NDArray[np.int64],
    tool: NDArray[np.int64],
    points: OutcomeTable | None,
) -> tuple[NDArray[np.float64], float]:
    """The losses and their limit, both brought to [0, 1]."""
    turns = replay(points, called) if points is not None else None
    if promise.kind == "accuracy_loss":
        lost = (
            np.where(called, 0.0, correct[rows, tool + 1] - correct[:, 0])
            if turns is None
            else (turns.full - turns.correct)
        )
        return (1 + lost) / 2, (1 + promise.limit) / 2
    if promise.kind == "calls":
        return called.astype(np.float64), promise.limit
    highest = float(promise.highest or 1)
    spent = np.where(called, cost[rows, tool + 1], cost[:, 0]) if turns is None else turns.cost
    if spent.max() > highest:
        raise InputError(f"A record cost {spent.max()!r}, over highest={highest!r}; state a true upper bound.")
    return spent / highest, promise.limit / highest


def _refusal(promise: Promise, n: int, groups: int, ahead: int | None) -> str:
    trivial = "always calling" if promise.kind == "accuracy_loss" else "never calling"
    together = f" in {groups} groups" if groups < n else ""
    over = f" over the next {ahead}" if ahead is not None else ""
    return (
        f"{n} held-out questions{together} can't support {promise.kind} at most {promise.limit!r}{over} with "
        f"confidence {1 - promise.delta:g}: only {trivial} keeps it for certain. Record more questions, promise less, "
        "or ask for less confidence."
    )


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Are these questions like those that the gate was calibrated on?"""

    drifted: bool
    p_value: float
    """Smallest of the columns', times the number of columns (Bonferroni)."""
    distance: float
    """Largest gap between two distribution functions, 0 to 1: how large the drift is, however many rows."""
    column: str
    """Where it is largest."""


def drift(
    reference: NDArray[np.float64], today: NDArray[np.float64], names: tuple[str, ...], *, level: float = 0.01
) -> Drift:
    """Two-sample Kolmogorov-Smirnov tests on the gate's own scores, one a column.

    It needs no outcomes, so it can run on live traffic. It sees a change that moves the gate's scores; it can't
    see one that only changes which answers are right.

    Args:
        reference: [N, S], scores of the questions calibrated on.
        today: [M, S].
        names: [S], of the columns.
        level: False alarms, of all checks without drift.

    Raises:
        InputError: fewer than 20 rows on a side.
    """
    if min(len(reference), len(today)) < 20:
        raise InputError(f"{len(reference)} and {len(today)} questions: a drift check needs 20 or more on each side.")
    tests = [ks_2samp(a, b, method="asymp") for a, b in zip(reference.T, today.T, strict=True)]
    worst = min(range(len(tests)), key=lambda index: float(tests[index].pvalue))
    p_value = min(1.0, float(tests[worst].pvalue) * len(tests))
    return Drift(drifted=p_value < level, p_value=p_value, distance=float(tests[worst].statistic), column=names[worst])


def exceeds_p_value(
    losses: NDArray[np.float64], limit: float, ahead: int | None = None, *, guess: float = 0.25, boldest: float = 0.75
) -> float:
    """p-value of "the mean is above `limit`", for exchangeable losses in [0, 1].

    A gambler bets, one record at a time and with stakes that look only at earlier records, that losses are below
    the limit. Under the hypothesis the expected capital never grows, so by Ville's inequality 1 / (its highest)
    is a p-value. Losses that are all 0 or 1 are tested by their exact distribution instead.

    Args:
        losses: [n], in an order that does not depend on them.
        limit: Of the mean.
        ahead: The mean is that of the next so many losses; of the long run by default. Both together are drawn
            from one urn without replacement, so what a loss is expected to be is the mean of all not yet seen.
        guess: Of the losses' variance, before any is seen.
        boldest: Share of the capital that one loss of 1 may cost at most. Both make the bets better or worse, never
            invalid.
    """
    n = len(losses)
    if limit <= 0:
        return 1.0
    if bool(np.all((losses == 0) | (losses == 1))):
        # Nothing is gained by betting where the exact tail is known.
        ones = int(losses.sum())
        if ahead is None:
            return float(binom.cdf(ones, n, limit))
        # The fewest in the urn with which the next ones break the limit.
        urn = ones + math.floor(limit * ahead + 1e-9) + 1
        return float(hypergeom.cdf(ones, n + ahead, urn, n)) if urn <= n + ahead else 1.0
    # Regularised running mean and variance, each from earlier records only.
    seen = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(losses)) / (seen + 1)
    variance = (guess + np.cumsum((losses - mean) ** 2)) / (seen + 1)
    mean, variance = np.r_[0.5, mean[:-1]], np.r_[guess, variance[:-1]]
    # The stake that is near best for the gap seen so far, kept from ruin.
    gap = np.maximum(limit - mean, 0.0)
    hedge = np.sqrt(2 * math.log(20) / np.maximum(variance * n, 1e-12))
    expected: NDArray[np.float64] | float = limit
    lowest = limit
    if ahead is not None:
        expected = (losses[::-1].cumsum()[::-1] + limit * ahead) / (n - seen + 1 + ahead)
        lowest = limit * ahead / (n + ahead)
    stake = np.minimum(np.maximum(gap / (variance + gap**2 + 1e-12), np.minimum(hedge, 0.5)), boldest / (1 - lowest))
    capital = np.cumsum(np.log1p(stake * (expected - losses)))
    return float(min(1.0, math.exp(-max(0.0, float(capital.max())))))


_KEPT = 1000
"""Scores kept of each column: evenly spaced ranks, so the distribution function is off by at most 1/2000."""


def reference_note(scored: Scored, tools: Sequence[str]) -> dict[str, Any]:
    """What `gate.json` keeps of the questions calibrated on."""
    columns = np.sort(_columns(scored), axis=0)
    rows = np.arange(len(columns))
    if len(rows) > _KEPT:
        rows = np.round((np.arange(_KEPT) + 0.5) * len(columns) / _KEPT - 0.5).astype(np.int64)
    return {"columns": list(_names(tools)), "values": columns[rows].T.tolist()}


def drift_since_calibration(artefact: Artefact, scored: Scored, *, level: float = 0.01) -> Drift | None:
    """Compare today's questions with those calibrated on; `None` where the gate was not calibrated by `metis`.

    The scores of its training questions would not do: each comes from a fold's gate, not from this one.

    Args:
        artefact: The gate's.
        scored: Its scores of today's questions.
        level: False alarms, of all checks without drift.

    Raises:
        InputError: fewer than 20 questions on a side.
        CheckpointError: what the gate says of the questions calibrated on is no such thing.
    """
    note = artefact.description["threshold"].get("reference")
    if note is None:
        return None
    try:
        reference = np.array(note["values"], dtype=np.float64).T
        if reference.ndim != 2 or reference.shape[1] != len(artefact.tools) + 1 or not np.isfinite(reference).all():
            raise ValueError(f"scores of shape {reference.shape}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{str(artefact.folder)!r} has no readable scores of the questions it was calibrated on ({error!r}). "
            "Calibrate it again."
        ) from error
    return drift(reference, _columns(scored), _names(artefact.tools), level=level)


def _columns(scored: Scored) -> NDArray[np.float64]:
    # Rounded on both sides: how near 1 a sure gate comes is no drift.
    return np.asarray(np.column_stack([scored.direct_right, scored.probabilities]).round(5), dtype=np.float64)


def _names(tools: Sequence[str]) -> tuple[str, ...]:
    return ("direct answer is right", *(f"{tool} is worth calling" for tool in tools))
