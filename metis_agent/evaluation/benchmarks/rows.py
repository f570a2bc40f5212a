"""Finds a benchmark's data set, on the hub or in a folder that holds a copy, and reads its rows without its pictures.

A data set is somebody else's file. Pictures are never decoded here; a row's path leads nowhere but into the folder.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from metis_agent.errors import InfrastructureError, InputError, MissingDependencyError
from metis_agent.evaluation.benchmarks.base import Row, Source

__all__ = ["Rows", "open_rows"]

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


def open_rows(source: Source, data: Path | None = None, *, cache: Path | None = None) -> Rows:
    """Read a data set.

    Args:
        source: Where it is.
        data: A folder with a copy of the repository, or of the files that are needed; by default it is fetched from
            the hub, once.
        cache: Where `datasets` keeps what it has read; by default its own folder.

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
            found = datasets.load_dataset(
                _READERS[path.suffix], data_files=[str(path)], split="train",
                cache_dir=None if cache is None else str(cache),
            )  # fmt: skip
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
