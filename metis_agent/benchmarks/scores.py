"""A benchmark's figures with their intervals: whole units are resampled, and the figure taken anew of each resample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from metis_agent.benchmarks.base import Measure
from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.evaluation import Estimate

__all__ = ["estimates"]

_BLOCK = 4_000_000
"""Entries of the table of resamples that are in memory at once."""


def estimates(
    measures: Mapping[str, Measure], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Estimate]:
    """Value and percentile bootstrap interval of each measure; all `None` where there is nothing to measure.

    Args:
        measures: Each over the same N units.
        resamples: Of the bootstrap.
        confidence: Coverage of the intervals.
        seed: Of the bootstrap: all measures see the same resamples.

    Raises:
        ConfigurationError: `resamples` or `confidence` is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ConfigurationError(
            f"resamples={resamples!r}, confidence={confidence!r}: at least 1 (1000 is usual), and between 0 and 1."
        )
    return {name: _estimate(measure, resamples, confidence, seed) for name, measure in measures.items()}


def _estimate(measure: Measure, resamples: int, confidence: float, seed: int) -> Estimate:
    units = measure.of.shape[1]
    value = float(_values(measure, np.ones((1, units)))[0]) if units else float("nan")
    counted = int((measure.of.sum(axis=0) > 0).sum())
    if np.isnan(value):
        return Estimate(value=None, low=None, high=None, questions=0)
    rng, found = np.random.default_rng(seed), np.empty(resamples)
    block = max(1, _BLOCK // units)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.multinomial(units, np.full(units, 1 / units), size=size).astype(np.float64)
        found[start : start + size] = _values(measure, drawn)
    tail = 50 * (1 - confidence)
    # A resample may hold no unit that counts.
    low, high = np.nanpercentile(found, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high), questions=counted)


def _values(measure: Measure, drawn_BN: NDArray[np.float64]) -> NDArray[np.float64]:
    """The measure of B resamples: of each part the ratio of sums, then the mean over the parts that have any."""
    right, of = drawn_BN @ measure.right.T, drawn_BN @ measure.of.T
    if not of.shape[1]:
        return np.full(len(drawn_BN), np.nan)
    with np.errstate(invalid="ignore"):
        ratios = np.where(of > 0, right / np.where(of > 0, of, 1.0), np.nan)
    there = ~np.isnan(ratios)
    counts = there.sum(axis=1)
    sums = np.where(there, ratios, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
