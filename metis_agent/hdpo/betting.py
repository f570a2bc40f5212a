"""Is a mean above a limit? A p-value from records alone, valid at every sample size, by betting against it.

Where it stands: `calibration` tests every threshold with it. Waudby-Smith and Ramdas, arXiv:2010.09686: with
replacement for the long run, without for the records that come next.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, hypergeom

__all__ = ["exceeds_p_value"]


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
