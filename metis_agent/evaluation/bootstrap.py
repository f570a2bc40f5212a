"""Bootstrap resamples of whole groups: of a document's questions, of a conversation's turns.

Under the evaluation of gates, their comparison, and the audit, which measure on each resample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Resamples", "interval_of"]

Float = NDArray[np.float64]
Index = NDArray[np.int64]


class Resamples:
    """Bootstrap resamples of whole groups of rows, the same ones whenever they are asked for.

    Args:
        groups: The group of each row; at least one.
        count: How many resamples, at most.
        seed: Of the drawing.
    """

    def __init__(self, groups: Sequence[str], count: int, seed: int) -> None:
        _, place = np.unique(groups, return_inverse=True)
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(place.max() + 2))
        self._members = [order[a:b] for a, b in itertools.pairwise(starts)]
        # Large sets have narrow intervals that need fewer resamples to be seen.
        self._count = min(count, max(50, 5_000_000 // len(place)))
        self._seed = seed

    def values(self, measure: Callable[[Index], Any]) -> Float:
        """[B, ...]: `measure` of the rows of each resample."""
        rng, groups = np.random.default_rng(self._seed), len(self._members)
        alone = groups == sum(map(len, self._members))
        rows = np.concatenate(self._members) if alone else None
        found = []
        for _ in range(self._count):
            drawn = rng.integers(0, groups, groups)
            found.append(
                measure(np.concatenate([self._members[group] for group in drawn]) if rows is None else rows[drawn])
            )
        return np.asarray(found, dtype=np.float64)

    def interval(self, measure: Callable[[Index], float]) -> list[float]:
        """95%, by percentiles."""
        return interval_of(self.values(measure))


def interval_of(values: Float) -> list[float]:
    """[low, high]: 95% of the values, by percentiles."""
    if np.isnan(values).all():
        # Nothing to measure, such as a ranking where the tool never does worse.
        return [float("nan"), float("nan")]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]
