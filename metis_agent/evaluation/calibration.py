"""A gate's threshold for a promise in the user's words, with a finite-sample guarantee.

Where it stands: a trained gate and records that it was *not* trained on -> a threshold for its `gate.json`.

A promise is on a mean over questions of a bounded loss L(threshold): accuracy lost against always calling,
calls, or cost. Thresholds are tested in an order fixed beforehand, from the one that keeps the promise for
certain, each null hypothesis "the mean loss exceeds the limit" at level delta, up to the first that can't be
rejected: the error over the whole sequence is then at most delta, though losses need not be monotone (Learn
Then Test, arXiv:2110.01052, fixed-sequence testing). Accuracy is compared pair by pair: most questions end alike down
both branches, and only those that part ways speak. Where each is won, lost or the same the p-value is exact
(`difference_p_value`), elsewhere it is of a test by betting (Waudby-Smith and Ramdas, arXiv:2010.09686): both are
valid at every sample size. Questions that came together, say those about one table, win and lose together: then it
is the groups that count as drawn independently.

What is bounded is the chance that the threshold was chosen although its *long-run mean* breaks the limit, for
questions drawn like those calibrated on; `metis_agent.evaluation.comparison` tests for that. The mean over the next few
hundred questions scatters around the long-run mean, so it breaks the limit more often. `ahead` bounds that as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv
from scipy.stats import binom, hypergeom

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.evaluation.gates import replay
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = [
    "Plan",
    "Promise",
    "Threshold",
    "choose_threshold",
    "difference_p_value",
    "exceeds_p_value",
    "plan_promises",
]

PromiseKind = Literal["accuracy_loss", "calls", "cost"]

GRID = 1 / (1 + np.exp(-np.linspace(-8, 8, 321)))
"""Thresholds tried; fixed before any record is seen."""
BOLDNESS = 0.1, 0.3, 1.0
"""Of gamblers who stake always the same part of what one may."""
CAREFUL = 0.8
"""Part of delta that tests of accuracy use, so that a count of broken promises stays within it, not its mean alone."""
_UNSURE, _STEPS = 0.001, 8


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
    always: float
    """Accuracy where a tool is always called."""
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
            "always": self.always,
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
    homes = replay(points, np.ones(n, dtype=bool)).homes if points is not None else ()
    pool = _Pool.of(homes or (groups if len(groups) else np.arange(n)))
    order = np.random.default_rng(seed).permutation(len(pool.size))
    tool = probabilities.argmax(axis=1)
    best, rows = probabilities[np.arange(n), tool], np.arange(n)
    from_always = promise.kind == "accuracy_loss"
    level = promise.delta * (CAREFUL if from_always else 1)
    found: float | None = None
    tested: NDArray[np.bool_] | None = None
    for value in GRID if from_always else GRID[::-1]:
        called = best > value
        if tested is None or bool((called != tested).any()):
            losses, limit = _losses(promise, called, correct, cost, rows, tool, points)
            if pool.p_value(losses, limit, order, ahead, paired=from_always) > level:
                break
        tested, found = called, float(value)
    called = best > (found if found is not None else (0.0 if from_always else 1.0))
    trivial = called.all() if from_always else not called.any()
    if found is None or trivial:
        raise InputError(_refusal(promise, n, len(pool.size), ahead))
    chosen = np.where(called, tool + 1, 0)
    losses, _ = _losses(promise, called, correct, cost, rows, tool, points)
    if points is None:
        accuracy, always = float(correct[rows, chosen].mean()), float(correct[rows, tool + 1].mean())
    else:
        turns = replay(points, called)
        accuracy, always = float(turns.correct.mean()), float(turns.full.mean())
    mean = float(losses.mean())
    if from_always:
        mean = 2 * mean - 1
    elif promise.kind == "cost":
        mean *= float(promise.highest or 1)
    return Threshold(
        value=found, promise=promise, rows=len(losses), groups=len(pool.size), ahead=ahead, mean=mean,
        tool_rate=float(called.mean()), accuracy=accuracy, always=always,
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

    def p_value(
        self, losses: NDArray[np.float64], limit: float, order: NDArray[np.int64], ahead: int | None, *, paired: bool
    ) -> float:
        """Of "the mean is above the limit", in the long run or in those ahead, whichever is surer.

        Args:
            losses: [N], of the questions.
            limit: Of their mean.
            order: [groups], in which they are bet on.
            ahead: See `choose_threshold`.
            paired: The losses are differences of two answers, brought to [0, 1].
        """
        # What a group's questions lost over the limit, over the most that there are in one: still in [0, 1], and
        # below the limit on average just where the questions' losses are.
        most = int(self.size.max())
        whole = limit + np.bincount(self.place, losses - limit) / most if most > 1 else losses[np.argsort(self.place)]
        # A group that loses all of its questions is far rarer than a question lost: bets may be bolder.
        guess, boldest = 0.25 * float(self.size.mean()) / most**2, 0.9 if most > 1 else 0.75
        test = partial(exceeds_p_value, whole[order], limit, guess=guess, boldest=boldest)
        lost = 2 * losses - 1
        exact = paired and most == 1 and bool(np.isin(lost, (-1, 0, 1)).all())
        long_run = difference_p_value(lost, 2 * limit - 1) if exact else test()
        return long_run if ahead is None else max(long_run, test(ahead=ahead))


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
class Plan:
    """What so many records can promise, over draws of that many."""

    rows: int
    promise: Promise
    refused: float
    """Share of draws that support none; always calling (for promised calls or cost: never) then counts."""
    tool_rate: float
    """Mean over draws, as is `accuracy`."""
    accuracy: float
    always: float


def plan_promises(
    probabilities: NDArray[np.float64],
    correct: NDArray[np.float64],
    cost: NDArray[np.float64],
    promises: Sequence[Promise],
    sizes: Sequence[int],
    *,
    groups: Sequence[object] = (),
    draws: int = 40,
    seed: int = 0,
) -> list[Plan]:
    """What so many records can promise for this gate, before they are recorded.

    They are drawn from those given, with replacement, whole groups at a time; what a threshold does is read off all.

    Args:
        probabilities: As `choose_threshold` takes them; so are `correct`, `cost` and `groups`.
        correct: [N, A].
        cost: [N, A].
        groups: [N].
        promises: To try.
        sizes: Records to calibrate on.
        draws: Of each size.
        seed: Of the drawing.
    """
    n, tool = len(correct), probabilities.argmax(axis=1)
    place = _Pool.of(groups if len(groups) else np.arange(n)).place
    members = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    best, rows = probabilities.max(axis=1), np.arange(n)
    found, always = [], float(correct[rows, tool + 1].mean())
    for size, promise in itertools.product(sizes, promises):
        rng, outcomes = np.random.default_rng(seed), []
        for draw in range(draws):
            picked = [members[k] for k in rng.integers(0, len(members), max(1, round(size * len(members) / n)))]
            home, index = np.repeat(np.arange(len(picked)), [len(part) for part in picked]), np.concatenate(picked)
            try:
                value = choose_threshold(
                    probabilities[index], correct[index], cost[index], promise, groups=tuple(home), seed=draw
                ).value
            except InputError:
                value = -1.0 if promise.kind == "accuracy_loss" else 1.0
            called = best > value
            right = correct[rows, np.where(called, tool + 1, 0)].mean()
            outcomes.append((value in (-1.0, 1.0), called.mean(), right))
        refused, rate, right = np.mean(np.array(outcomes, dtype=np.float64), axis=0).tolist()
        found.append(Plan(rows=size, promise=promise, refused=refused, tool_rate=rate, accuracy=right, always=always))
    return found


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
    most = boldest / (1 - lowest)
    careful = np.minimum(np.maximum(gap / (variance + gap**2 + 1e-12), np.minimum(hedge, 0.5)), most)
    # The capital is shared out at the start: half is staked with care, the rest ever more boldly, for where next to
    # nothing is lost there are too few records to learn so first.
    shares = np.array([0.5, *[0.5 / len(BOLDNESS)] * len(BOLDNESS)])
    stakes = np.stack([careful, *(np.full(n, most * part) for part in BOLDNESS)])
    capital = shares @ np.exp(np.minimum(np.cumsum(np.log1p(stakes * (expected - losses)), axis=1), 600.0))
    return min(1.0, 1 / max(1e-300, float(capital.max())))


def difference_p_value(lost: NDArray[np.float64], limit: float) -> float:
    """p-value of "the mean is above `limit`", for independent differences that are -1, 0 or 1; exact.

    With b of n pairs lost and c won, the statistic is (b - c - n limit) / sqrt(b + c + 1). Its distribution follows
    from the share of pairs that part ways, which is not known: the p-value is the largest over an interval of
    confidence 0.999 for that share, and 0.001 on top (Berger and Boos, 1994). For a limit on how much worse one of two
    matched proportions may be this is a test of non-inferiority (Hsueh, Liu and Chen, 2001).

    Args:
        lost: [n], in any order.
        limit: Of the mean, above 0.
    """
    n, apart, net = len(lost), int(np.count_nonzero(lost)), float(lost.sum())
    if limit <= 0:
        return 1.0
    low = betaincinv(apart, n - apart + 1, _UNSURE / 2) if apart else 0.0
    high = betaincinv(apart + 1, n - apart, 1 - _UNSURE / 2) if apart < n else 1.0
    low, high = max(float(low), limit), max(float(high), limit)  # a mean of `limit` needs that many
    first, last = (turn(_STEPS * math.log(share / limit)) for turn, share in ((math.floor, low), (math.ceil, high)))
    statistic = (net - n * limit) / math.sqrt(apart + 1) + 1e-9
    worst = max(_chance_below(n, limit, step, statistic) for step in range(first, last + 1))
    return min(1.0, _UNSURE + worst)


def _chance_below(n: int, limit: float, step: int, statistic: float) -> float:
    values, chances = _distribution(n, limit, step)
    return float(chances[int(np.searchsorted(values, statistic, side="right"))])


@lru_cache(maxsize=256)
def _distribution(n: int, limit: float, step: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the statistic at the edge, where a share of limit exp(step / _STEPS) part ways: values, and P(at most that).

    Thinned out to some thousands of values, so that a chance that is looked up can only come out too large.
    """
    share = min(1.0, limit * math.exp(step / _STEPS))
    lose = (share + limit) / (2 * share)
    middle, reach = n * share, 5 * math.sqrt(n * share * (1 - share)) + 9
    parted = np.arange(max(0, int(middle - reach)), min(n, int(middle + reach)) + 1)[:, None]
    reach = int(5 * math.sqrt(float(parted[-1, 0]) * lose * (1 - lose))) + 9
    lost = (parted * lose).astype(np.int64) + np.arange(-reach, reach + 1)
    held = (lost >= 0) & (lost <= parted)
    chance = (binom.pmf(parted, n, share) * binom.pmf(lost, parted, lose))[held]
    value = ((2 * lost - parted - n * limit) / np.sqrt(parted + 1))[held]
    order = np.argsort(value)
    value, total = value[order], np.cumsum(chance[order])
    kept = np.arange(0, len(value), 1 + len(value) // 5000)
    return value[kept], np.append(0.0, total[np.append(kept[1:], len(value)) - 1])
