"""The rows of many trajectories in an Arrow file, and what became of the trajectories.

Between `sft_rows` and the training in `cold_start`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_agent.errors import InputError
from metis_agent.hdpo.sft_rows import SftRow, Source, sft_rows
from metis_agent.types import Trajectory

__all__ = ["SftData", "write_sft_data"]


@dataclass(frozen=True, kw_only=True)
class SftData:
    """Rows in an Arrow file, and what became of the trajectories."""

    path: Path
    trajectories: int
    rows: int
    tokens: int
    learnt: int
    """Tokens that carry loss."""
    excluded: Mapping[str, int]
    """Trajectories left out, by reason."""


def write_sft_data(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    path: Path,
    *,
    max_length: int | None,
    tools: Sequence[Any] = (),
    source: Source = "auto",
) -> SftData:
    """Write the rows of trajectories to an Arrow file, streaming.

    A trajectory of which any row is longer than `max_length` is left out and counted, never cut: a cut one would
    teach to stop before the answer.

    Raises:
        InputError: nothing is left to learn from.
    """
    import pyarrow

    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])
    excluded: Counter[str] = Counter()
    total = rows_written = tokens = learnt = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for rows in _usable(trajectories, tokenizer, max_length, tools, source, excluded):
            total += 1
            columns = [[row.input_ids for row in rows], [row.labels for row in rows]]
            arrays = [pyarrow.array(column, schema.field(0).type) for column in columns]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            rows_written += len(rows)
            tokens += sum(len(row.input_ids) for row in rows)
            learnt += sum(row.learnt for row in rows)
    if not rows_written:
        raise InputError(f"none of the trajectories can be learnt from: {dict(excluded)!r}. Check the store.")
    return SftData(
        path=path, trajectories=total, rows=rows_written, tokens=tokens, learnt=learnt, excluded=dict(excluded)
    )


def _usable(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    max_length: int | None,
    tools: Sequence[Any],
    source: Source,
    excluded: Counter[str],
) -> Iterator[tuple[SftRow, ...]]:
    for trajectory in trajectories:
        try:
            rows = sft_rows(trajectory, tokenizer, tools=tools, source=source)
        except InputError as error:
            excluded[_short(str(error))] += 1
            continue
        if max_length is not None and any(len(row.input_ids) > max_length for row in rows):
            excluded[f"longer than {max_length} tokens"] += 1
        elif not any(row.learnt for row in rows):
            excluded["nothing of its own"] += 1
        else:
            yield tuple(row for row in rows if row.learnt)


def _short(message: str) -> str:
    for sign, reason in (("failed", "failed run"), ("images", "has images"), ("no reply", "no reply")):
        if sign in message:
            return reason
    return "template writes replies otherwise" if "chat template" in message else "no usable token ids"
