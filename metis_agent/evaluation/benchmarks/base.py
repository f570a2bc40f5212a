"""What a benchmark is: rows of a public data set in, questions out, answers in, figures out.

Between `rows` and `run` (the agent). A benchmark neither asks a model nor touches a store, so its rules can be
read, and tested, by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metis_agent.types import Question

__all__ = ["Benchmark", "Item", "Measure", "Published", "Row", "Source", "Verdicts", "spread"]

Row = Mapping[str, Any]

Verdicts = Mapping[str, bool]
"""Whether the answer was right, by question id; a question that could not be judged is not there."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set is: a repository of the hub, or a copy of it in a folder."""

    repository: str
    """Such as "craigwu/vstar_bench"."""
    files: tuple[str, ...]
    """Patterns of the files with the rows, as paths in the repository."""
    beside: tuple[str, ...] = ()
    """Patterns of files that the rows name, such as pictures."""
    images: str
    """The column with the picture: a file's bytes, its base64, or a path in the repository."""
    licence: str
    """What the data may be used for, in the words of its card."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question of a benchmark, without its picture."""

    question: Question
    """Its metadata hold what scoring needs."""
    unit: str
    """What is resampled and limited as a whole: the questions that share one are scored together."""
    row: int
    """Of the data set, where the picture is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measure:
    """A figure of N units: the mean over K parts of sum(right) / sum(of).

    An accuracy has one part; HR-Bench, whose score is a mean of means, has one for each order of the options.
    """

    right: NDArray[np.float64]
    """[K, N]"""
    of: NDArray[np.float64]
    """[K, N]"""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure that somebody has published, to stand beside ours."""

    who: str
    values: Mapping[str, float] = field(default_factory=dict)
    """By measure, as shares of 1."""


class Benchmark(Protocol):
    """One benchmark, without state."""

    name: str
    source: Source
    headline: tuple[str, ...]
    """Measures to show first."""
    published: tuple[Published, ...]

    def items(self, rows: Iterable[Row]) -> list[Item]:
        """The questions.

        Args:
            rows: Of the data set, pictures left out.

        Raises:
            InputError: a row lacks what the benchmark needs.
        """
        ...

    def right(self, question: Question, answer: str) -> bool | None:
        """Whether an answer is right, by the benchmark's own rule; `None` where no rule can read it.

        What no rule can read counts as wrong, unless a judge is asked.
        """
        ...

    def measures(self, items: Sequence[Item], verdicts: Verdicts) -> dict[str, Measure]:
        """The benchmark's figures, over units.

        Args:
            items: All that were asked.
            verdicts: Of those that could be judged.
        """
        ...


def spread(
    items: Sequence[Item], verdicts: Verdicts, parts: Mapping[str, Sequence[Sequence[Item]]]
) -> dict[str, Measure]:
    """Accuracies as measures.

    Args:
        items: All that were asked; their units, in order, are the N columns.
        verdicts: Of those that could be judged.
        parts: For each measure K sets of items.
    """
    columns = {unit: column for column, unit in enumerate(dict.fromkeys(item.unit for item in items))}
    found: dict[str, Measure] = {}
    for name, sets in parts.items():
        right, of = np.zeros((len(sets), len(columns))), np.zeros((len(sets), len(columns)))
        for part, members in enumerate(sets):
            for item in members:
                if (verdict := verdicts.get(item.question.id)) is not None:
                    right[part, columns[item.unit]] += verdict
                    of[part, columns[item.unit]] += 1
        found[name] = Measure(right=right, of=of)
    return found
