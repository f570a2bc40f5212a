"""What a benchmark is: rows of a public data set in, questions out, answers in, figures out.

Between `rows` and `run` (the agent). A benchmark neither asks a model nor touches a store, so its rules can be
read, and tested, by themselves.

Which option does an answer choose? For benchmarks with options A, B, C, ...

A benchmark's figures with their intervals: whole units are resampled, and the figure taken anew of each resample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError
from metis_agent.evaluation.agents import Estimate
from metis_agent.judging.short_answers import choice, normalise
from metis_agent.types import Question

__all__ = [
    "Benchmark",
    "Item",
    "Measure",
    "Published",
    "Row",
    "Source",
    "Verdicts",
    "chosen_letter",
    "estimates",
    "item_id",
    "listed",
    "spread",
]

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


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer commits to.

    Args:
        answer: The model's own final message.
        options: Their texts by letter.

    Returns:
        `None` where it names no letter, leaves another open, or names one that is not there. An answer that is the
        text of one option, and of no other, chooses that.
    """
    named = [letter for letter in options if choice(Question(id="", text="", answer=letter), answer)]
    if named:
        return named[0]
    said = normalise(answer)
    same = [letter for letter, text in options.items() if said and normalise(text) == said]
    return same[0] if len(same) == 1 else None


def listed(options: Mapping[str, str]) -> str:
    """The options, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def item_id(benchmark: str, row: int, text: str, answer: str) -> str:
    """Names a question by its place and by what it asks: another edition of a data set has other names."""
    digest = hashlib.sha256(f"{text}\x00{answer}".encode("utf-8", "replace")).hexdigest()
    return f"{benchmark}/{row:05d}-{digest[:8]}"


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
