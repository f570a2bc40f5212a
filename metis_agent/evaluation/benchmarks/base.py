"""What a benchmark is: rows of a public data set in, questions out, answers in, figures out.

A benchmark neither asks a model nor touches a store, so its rules can be read, and tested, by themselves. Beside it:
which of the options A, B, C, ... an answer chooses; figures with their intervals, by resampling whole units; and rows
of a data set, on the hub or in a folder that holds a copy. That is somebody else's file: pictures are never decoded
here, and a row's path leads nowhere but into the folder.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InfrastructureError, InputError, MissingDependencyError
from metis_agent.evaluation.agents import Estimate
from metis_agent.judging.short_answers import choice, normalise
from metis_agent.types import Question

__all__ = [
    "Benchmark",
    "Item",
    "Measure",
    "Published",
    "Row",
    "Rows",
    "Source",
    "Verdicts",
    "chosen_letter",
    "estimates",
    "item_id",
    "listed",
    "open_rows",
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


_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


class Rows:
    """The rows of a data set, in its own order.

    Args:
        folder: Where a row's path leads.
        sets: One `datasets.Dataset` a file.
        names: Of the files.
        source: Says where a row's picture is.
    """

    def __init__(self, folder: Path, sets: Sequence[Any], names: Sequence[str], source: Source) -> None:
        self._folder, self._images, self._by_name = folder, source.images, bool(source.beside)
        self._sets, self._names = list(sets), list(names)
        self._bare = [found.remove_columns([source.images]) for found in self._sets]

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def __iter__(self) -> Iterator[Row]:
        """The rows without the picture, each with `file`, the name of the file that it is in."""
        for name, found in zip(self._names, self._bare, strict=True):
            for row in found:
                yield {**row, "file": name}

    def picture(self, number: int) -> bytes:
        """The bytes of a row's picture, unchecked.

        Raises:
            InputError: the row has none, or names a file that is not in the folder.
        """
        place = number
        for found in self._sets:
            if place < len(found):
                return self._bytes(found[place][self._images], number)
            place -= len(found)
        raise InputError(f"there is no row {number!r}: the data set has {len(self):,}.")

    def digest(self) -> str:
        """A hash of all that is asked, pictures left out."""
        found = hashlib.sha256()
        for row in self:
            found.update(repr(sorted(row.items(), key=lambda entry: entry[0])).encode("utf-8", "replace"))
        return found.hexdigest()[:16]

    def _bytes(self, value: Any, number: int) -> bytes:
        if isinstance(value, Mapping):  # a column of images, not decoded
            value = value.get("bytes")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise InputError(f"row {number}: column {self._images!r} holds no picture but {type(value).__name__}.")
        return self._file(value, number) if self._by_name else _from_base64(value, number)

    def _file(self, name: str, number: int) -> bytes:
        path = PurePosixPath(name)
        # The name is out of a row and not ours. Links are followed: the hub's client lays out a folder with them.
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\x00" in name:
            raise InputError(f"row {number}: the picture {name[:200]!r} is outside of the data set's folder.")
        try:
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise InputError(f"row {number}: the picture {name[:200]!r} can't be read: {error.strerror}.") from error


def open_rows(source: Source, data: Path | None = None) -> Rows:
    """Read a data set.

    Args:
        source: Where it is.
        data: A folder with a copy of the repository, or of the files that are needed; by default it is fetched from
            the hub, once.

    Raises:
        InputError: the folder lacks a file, or a file is no such data set.
        InfrastructureError: the hub can't be reached.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets = _library()
    folder = data if data is not None else _fetched(source)
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; give --data a copy of {source.repository!r}.")
    sets, names = [], []
    for path in _files(source, folder):
        try:
            found = datasets.load_dataset(_READERS[path.suffix], data_files=[str(path)], split="train")
        except Exception as error:  # whatever a broken file makes of its readers
            cause = error.__cause__ or error
            raise InputError(f"{str(path)!r} can't be read: {type(cause).__name__}: {cause}.") from error
        if source.images not in found.column_names:
            raise InputError(
                f"{str(path)!r} has the columns {found.column_names!r} and no {source.images!r}: is it the data set "
                f"{source.repository!r}?"
            )
        sets.append(_undecoded(datasets, found, source.images))
        names.append(path.name)
    return Rows(folder, sets, names, source)


def _undecoded(datasets: Any, found: Any, column: str) -> Any:
    """A picture's bytes as they are: what `datasets` would decode, it would decode without limits."""
    if isinstance(found.features[column], datasets.Image):
        return found.cast_column(column, datasets.Image(decode=False))
    return found


def _files(source: Source, folder: Path) -> list[Path]:
    there = sorted(path for path in folder.rglob("*") if path.suffix in _READERS)
    named = {path.relative_to(folder).as_posix(): path for path in there}
    found = [
        path for pattern in source.files for name, path in named.items() if fnmatch.fnmatchcase(name, pattern)
    ]  # fmt: skip
    missing = [pattern for pattern in source.files if not any(fnmatch.fnmatchcase(name, pattern) for name in named)]
    if missing:
        raise InputError(
            f"{str(folder)!r} has no {missing[0]!r}; it has {sorted(named)[:10]!r}. Copy the repository "
            f"{source.repository!r}, as `hf download {source.repository} --repo-type dataset --local-dir DIR` does."
        )
    return found


def _fetched(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.repository, repo_type="dataset", allow_patterns=[*source.files, *source.beside]
            )
        )  # fmt: skip
    except Exception as error:  # offline, gated, renamed: the hub's client has an error for each
        raise InfrastructureError(
            f"the data set {source.repository!r} can't be fetched: {type(error).__name__}: {str(error)[:300]}. Fetch "
            "it elsewhere and name the folder with --data."
        ) from error


def _from_base64(text: str, number: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"row {number}: {text[:80]!r} is no base64.") from error


def _library() -> Any:
    try:
        import datasets
    except ImportError as missing:
        raise MissingDependencyError(
            f"benchmarks need {missing.name!r}; install it with: pip install 'langgraph-metis[train,images]'"
        ) from missing
    return datasets
