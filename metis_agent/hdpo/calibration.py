"""A gate's threshold for a promise in the user's words, with a finite-sample guarantee; and a check for drift.

Where it stands: a trained gate and records that it was *not* trained on -> a threshold for its `gate.json`.

A promise is on a mean over questions of a bounded loss L(threshold): accuracy lost against always calling,
calls, or cost. Thresholds are tested in an order fixed beforehand, from the one that keeps the promise for
certain, each null hypothesis "the mean loss exceeds the limit" at level delta, up to the first that can't be
rejected: the error over the whole sequence is then at most delta, though losses need not be monotone (Learn
Then Test, arXiv:2110.01052, fixed-sequence testing). Each p-value is of a test by betting (Waudby-Smith and
Ramdas, arXiv:2010.09686): valid at every sample size, and narrow where most losses are 0.

It holds for questions drawn like those calibrated on, in their long-run mean; `drift` tests for that. The mean
over a few hundred particular questions scatters around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, ks_2samp

from metis_agent.errors import ConfigurationError, InputError

__all__ = ["Drift", "Promise", "Threshold", "choose_threshold", "drift", "exceeds_p_value"]

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
    mean: float
    """Of the promised quantity, on the calibration records."""
    tool_rate: float
    accuracy: float

    def note(self) -> dict[str, object]:
        """For `gate.json`."""
        chosen = (
            f"{self.promise.kind} at most {self.promise.limit} with confidence {1 - self.promise.delta:g}, "
            f"learn-then-test on {self.rows} held-out questions"
        )
        return {
            "value": self.value, "chosen": chosen, "rows": self.rows, "mean": self.mean,
            "tool_rate": self.tool_rate, "accuracy": self.accuracy,
        }  # fmt: skip


def exceeds_p_value(losses: NDArray[np.float64], limit: float) -> float:
    """p-value of "the mean of these is above `limit`", for independent losses in [0, 1].

    A gambler bets, one record at a time and with stakes that look only at earlier records, that losses are below
    the limit. Under the hypothesis the expected capital never grows, so by Ville's inequality 1 / (its highest)
    is a p-value. Losses that are all 0 or 1 are tested by the binomial distribution instead.
    """
    if limit <= 0:
        return 1.0
    if bool(np.all((losses == 0) | (losses == 1))):
        # Nothing is gained by betting where the exact binomial tail is known.
        return float(binom.cdf(losses.sum(), len(losses), limit))
    # Regularised running mean and variance, each from earlier records only.
    n = np.arange(1, len(losses) + 1)
    mean = (0.5 + np.cumsum(losses)) / (n + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2)) / (n + 1)
    mean, variance = np.r_[0.5, mean[:-1]], np.r_[0.25, variance[:-1]]
    # The stake that is near best for the gap seen so far, kept from ruin.
    gap = np.maximum(limit - mean, 0.0)
    hedge = np.sqrt(2 * math.log(20) / np.maximum(variance * len(losses), 1e-12))
    stake = np.minimum(np.maximum(gap / (variance + gap**2 + 1e-12), np.minimum(hedge, 0.5)), 0.75 / (1 - limit))
    capital = np.cumsum(np.log1p(stake * (limit - losses)))
    return float(min(1.0, math.exp(-max(0.0, float(capital.max())))))


def choose_threshold(
    probabilities: NDArray[np.float64],
    correct: NDArray[np.float64],
    cost: NDArray[np.float64],
    promise: Promise,
    *,
    seed: int = 0,
) -> Threshold:
    """The threshold nearest to the user's wish of those certified to keep the promise.

    For a promised accuracy that is the one with the fewest calls, for promised calls or cost the one with the
    most.

    Args:
        probabilities: [N, A - 1], the gate's, for questions that it was not trained on.
        correct: [N, A].
        cost: [N, A].
        promise: To keep.
        seed: Of the order in which records are bet on.

    Raises:
        InputError: the records can't support the promise: only the trivial threshold could be certified.
    """
    n = len(correct)
    if n == 0 or probabilities.shape != (n, correct.shape[1] - 1):
        raise InputError(
            f"probabilities is {probabilities.shape!r} and correct {correct.shape!r}: need [N, A - 1], N > 0."
        )
    order = np.random.default_rng(seed).permutation(n)
    tool = probabilities.argmax(axis=1)
    best, rows = probabilities[np.arange(n), tool], np.arange(n)
    from_always = promise.kind == "accuracy_loss"
    found: float | None = None
    for value in GRID if from_always else GRID[::-1]:
        called = best > value
        losses, limit = _losses(promise, called, correct, cost, rows, tool)
        if exceeds_p_value(losses[order], limit) > promise.delta:
            break
        found = float(value)
    called = best > (found if found is not None else (0.0 if from_always else 1.0))
    trivial = called.all() if from_always else not called.any()
    if found is None or trivial:
        raise InputError(_refusal(promise, n))
    chosen = np.where(called, tool + 1, 0)
    losses, _ = _losses(promise, called, correct, cost, rows, tool)
    mean = float(losses.mean())
    if from_always:
        mean = 2 * mean - 1
    elif promise.kind == "cost":
        mean *= float(promise.highest or 1)
    return Threshold(
        value=found, promise=promise, rows=n, mean=mean,
        tool_rate=float(called.mean()), accuracy=float(correct[rows, chosen].mean()),
    )  # fmt: skip


def _losses(
    promise: Promise,
    called: NDArray[np.bool_],
    correct: NDArray[np.float64],
    cost: NDArray[np.float64],
    rows: NDArray[np.int64],
    tool: NDArray[np.int64],
) -> tuple[NDArray[np.float64], float]:
    """The losses and their limit, both brought to [0, 1]."""
    if promise.kind == "accuracy_loss":
        lost = np.where(called, 0.0, correct[rows, tool + 1] - correct[:, 0])
        return (1 + lost) / 2, (1 + promise.limit) / 2
    if promise.kind == "calls":
        return called.astype(np.float64), promise.limit
    highest = float(promise.highest or 1)
    spent = np.where(called, cost[rows, tool + 1], cost[:, 0])
    if spent.max() > highest:
        raise InputError(f"A record cost {spent.max()!r}, over highest={highest!r}; state a true upper bound.")
    return spent / highest, promise.limit / highest


def _refusal(promise: Promise, n: int) -> str:
    trivial = "always calling" if promise.kind == "accuracy_loss" else "never calling"
    return (
        f"{n} held-out questions can't support {promise.kind} at most {promise.limit!r} with confidence "
        f"{1 - promise.delta:g}: only {trivial} keeps it for certain. Record more questions, promise less, or ask for "
        "less confidence."
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
