"""Means over questions with 95% intervals, as the report gives them.

- Percentile bootstrap over questions, 1,000 resamples, as in `hdpo.evaluation`; from 5,000 questions on the normal
  approximation, which is then the same to the digits shown.
- A share that was the same on every question has no bootstrap interval worth the name: [0, 0] of 20 questions would
  read as a promise. There the exact (Clopper-Pearson) bound stands: after n questions without an exception, a rate
  of exceptions up to 1 - 0.025^(1/n) is compatible with what was seen.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from metis_agent.hdpo.evaluation import Estimate

__all__ = ["difference_of_means", "mean_of", "wilson"]

RESAMPLES = 1000
MANY = 5000
_Z = 1.959963984540054


def mean_of(values: NDArray[np.float64], *, low: float = -math.inf, high: float = math.inf, seed: int = 0) -> Estimate:
    """The mean of the values that are numbers.

    Args:
        values: [N], one a question, NaN where it does not count.
        low: Below which no value can be.
        high: Above which none can be; with `low` it bounds what was the same everywhere.
        seed: Of the bootstrap.
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
        bottom, top = (float(edge) for edge in np.percentile(_resampled(values, seed), [2.5, 97.5]))
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


def _resampled(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    n = len(values)
    return np.asarray(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) @ values / n)
