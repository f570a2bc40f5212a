"""Rows of a table in a file: JSONL, CSV and Parquet, and whatever format is registered beside them.

Questions (`questions`) and recorded outcomes (`outcome_files`) are read by it. Text stays text: in a CSV the id "007"
is not 7, and which columns are numbers is for the reader of the rows to know.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError

__all__ = ["TABLE_FORMATS", "Row", "read_rows", "register_table_format"]

Row = Mapping[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time.

    Raises:
        ConfigurationError: a format that is not read.
        InputError: the file can't be read; the message names the line where there is one.
        MissingDependencyError: the format needs an extra.
    """
    reader = TABLE_FORMATS.get(path.suffix)
    if reader is None:
        raise ConfigurationError(
            f"{str(path)!r} is none of {sorted(TABLE_FORMATS)!r}: convert it, rename it if it is, or register its "
            "format (metis_agent.rollouts.tables.register_table_format)."
        )
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{str(path)!r} can't be read as {path.suffix!r}: {error}.") from error


def register_table_format(suffix: str, reader: Callable[[Path], Iterator[Row]]) -> None:
    """Read files of this suffix, such as ".xlsx", by `reader`, which yields their rows.

    Raises:
        ConfigurationError: the suffix has no dot, or is another format's.
    """
    if not suffix.startswith(".") or TABLE_FORMATS.get(suffix, reader) is not reader:
        raise ConfigurationError(f"{suffix!r} can't be registered: a new suffix such as '.xlsx' is wanted.")
    TABLE_FORMATS[suffix] = reader


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path.name} line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name} line {number} is {row!r}; each line is one JSON object.")
            yield row


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            yield {name: value for name, value in row.items() if name is not None}


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as missing:
        raise MissingDependencyError(
            f"Reading {path.name!r} needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"{str(path)!r} can't be read as '.parquet': {error}.") from error


TABLE_FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
"""Readers by the suffix of a file's name."""
