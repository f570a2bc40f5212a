"""Shares of calls with their intervals, by conversation; and what a person's check makes of a judge's verdicts.

Calls of one conversation are alike, so conversations are resampled whole. A share is a ratio of sums: redundant calls
of all turns by calls of all turns. Where verdicts come from a judge that errs, turns drawn at random are checked by a
person, and the judge's error there corrects the share everywhere (prediction-powered inference: Angelopoulos et al.,
2023, arXiv 2301.09633, with the weight of PPI++, arXiv 2311.01453).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from metis_agent.evaluation.agents import Estimate
from metis_agent.evaluation.bootstrap import Resamples, interval_of

__all__ = ["Resampled", "corrected_ratio"]

Float = NDArray[np.float64]
_RESAMPLES = 1000
_NOTHING = Estimate(value=None, low=None, high=None, questions=0)


class Resampled:
    """Ratios and sums over turns, with percentile intervals over conversations.

    Args:
        groups: [N], the conversation of each turn.
        seed: Of the bootstrap.
    """

    def __init__(self, groups: Sequence[str], *, seed: int = 0) -> None:
        self._n = len(groups)
        self._count = len(set(groups))
        self._resamples = Resamples(groups, _RESAMPLES, seed) if groups else None

    def ratio(self, above: Float, below: Float) -> Estimate:
        """Sum of one column by sum of another; `questions` is the latter.

        A share that is 0 or 1 throughout has the exact (Clopper-Pearson) bound for so many conversations: a
        bootstrap of what never varies would read as a promise.
        """
        whole = float(below.sum())
        if self._resamples is None or not whole:
            return _NOTHING
        value = float(above.sum()) / whole
        if np.array_equal(above, below) or not above.any():
            width = 1 - 0.025 ** (1 / self._count)
            low, high = (0.0, width) if value == 0 else (1 - width, 1.0)
        else:
            low, high = self._interval(lambda rows: _by(above[rows].sum(), below[rows].sum()))
        return Estimate(value=value, low=low, high=high, questions=round(whole))

    def total(self, column: Float, scale: float = 1.0) -> Estimate:
        """Sum of a column, times what the sample stands for."""
        if self._resamples is None:
            return _NOTHING
        low, high = self._interval(lambda rows: float(column[rows].mean()))
        size = scale * self._n
        return Estimate(value=scale * float(column.sum()), low=size * low, high=size * high, questions=self._n)

    def _interval(self, measure: Callable[[NDArray[np.int64]], float]) -> tuple[float, float]:
        assert self._resamples is not None
        low, high = interval_of(self._resamples.values(measure))
        return low, high


def corrected_ratio(
    judged: Float,
    below: Float,
    checked: NDArray[np.int64],
    person: Float,
    groups: Sequence[str],
    *,
    fallible: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Estimate:
    """A share by a judge's verdicts, corrected by a person's on some of the turns.

    The estimate is w J + (P' - w J'): J is the judge's share of all turns, J' and P' the judge's and the person's of
    the checked ones. Its bias is none whatever w is; w is chosen so that it varies least, so it is never wider than
    what the checked turns alone would give.

    Args:
        judged: [N], redundant calls of each turn by the judge.
        below: [N], calls of each turn.
        checked: [n], rows drawn at random from the fallible ones.
        person: [n], redundant calls of those turns by the person's verdicts.
        groups: [N], conversations.
        fallible: [N], turns on which a judge ruled; the others are taken as they are. All by default.
        seed: Of the bootstrap.
    """
    if not len(checked) or not below[checked].sum():
        return _NOTHING
    by_person = np.full(len(judged), np.nan)
    by_person[checked] = person
    is_checked = ~np.isnan(by_person)
    weight = _weight(judged[checked], person, below[checked])

    by_judge = np.ones(len(judged), dtype=bool) if fallible is None else fallible
    weighed = np.where(by_judge, weight * judged, judged)

    def parts(rows: NDArray[np.int64]) -> tuple[float, float]:
        few, whole = rows[is_checked[rows]], float(below[rows].sum())
        error = _by(by_person[few].sum() - weighed[few].sum(), below[few].sum())
        return _by(weighed[rows].sum(), whole), error * _by(below[rows[by_judge[rows]]].sum(), whole)

    drawn = Resamples(groups, _RESAMPLES, seed).values(parts)
    everywhere, error = parts(np.arange(len(judged)))
    low, high = interval_of(np.clip(drawn.sum(axis=1) + _doubt(drawn[:, 1], groups, checked, seed), 0.0, 1.0))
    return Estimate(
        value=min(max(everywhere + error, 0.0), 1.0), low=low, high=high, questions=round(float(below.sum()))
    )


def _weight(judged: Float, person: Float, below: Float) -> float:
    """Covariance by variance of the two shares' residuals, within 0 and 1."""
    by_judge = judged - below * judged.sum() / below.sum()
    by_person = person - below * person.sum() / below.sum()
    spread = float(by_judge @ by_judge)
    return min(max(float(by_judge @ by_person) / spread, 0.0), 1.0) if spread else 1.0


def _doubt(error: Float, groups: Sequence[str], checked: NDArray[np.int64], seed: int) -> Float:
    """Noise that widens a correction by too few errors: 30 checks without one don't prove that there are none.

    The correction varies at least as if two of the checked conversations had an error, as Agresti and Coull add two.
    """
    least = math.sqrt(2) / len({groups[row] for row in checked})
    missing = math.sqrt(max(0.0, least**2 - float(np.nanvar(error))))
    return np.random.default_rng(seed + 1).normal(0.0, missing, len(error))


def _by(above: float, below: float) -> float:
    return float(above) / float(below) if below else float("nan")
