"""Outcome tables from Parquet, CSV and JSONL files.

Only the columns that are used are kept, and what is wrong with a file is said before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError
from metis_agent.gates.features import agreement, draft_text_features
from metis_agent.rollouts.outcomes import DIRECT, OutcomeTable

__all__ = ["CONTEXT_COLUMNS", "read_outcomes"]

CONTEXT_COLUMNS = ("context", "table", "text", "passage")
"""Columns taken as the question's context where none are named."""


def read_outcomes(
    path: str | Path,
    *,
    direct: str = "direct",
    tools: Mapping[str, str],
    context: Sequence[str] | None = None,
    group_by: str | None = None,
) -> OutcomeTable:
    """Read a table of outcomes.

    Args:
        path: A `.parquet`, `.csv` or `.jsonl` file.
        direct: Branch of the direct answers: the table has `<direct>_correct`.
        tools: Tool name -> branch.
        context: Columns that, joined by line breaks, are what came with the question; by default those of
            `CONTEXT_COLUMNS` that the table has.
        group_by: Column whose rows stay together when splitting; the question by default.

    Numbers in columns `draft_*` become features. So do a few facts about the text `draft_answer`, and, where the
    direct answers are recorded too, how far the two attempts agree (`draft_agreement`, `draft_containment`).

    Raises:
        ConfigurationError: no tool, a column named that is not there, or a format that is not read.
        InputError: the file can't be read, has no branches, or a value is out of its range.
    """
    table = _read(Path(path))
    names = list(table.column_names)
    branches = {DIRECT: direct, **tools}
    _check_columns(names, branches, [*(context or ()), *([group_by] if group_by else [])])
    if DIRECT in tools or len(set(branches.values())) < len(branches):
        raise ConfigurationError(
            f"The branches are {branches!r}: each action needs a branch of its own, and no tool may be named "
            f"{DIRECT!r}."
        )
    questions = _texts(table, "question")
    used = [name for name in (CONTEXT_COLUMNS if context is None else context) if name in names]
    return OutcomeTable(
        questions=questions,
        actions=tuple(branches),
        correct=_stack(table, branches, "correct"),
        cost=_stack(table, branches, "cost", [0.0] + [1.0] * len(tools)),
        seconds=_stack(table, branches, "seconds", [np.nan] * len(branches)),
        contexts=tuple(map("\n".join, zip(*(_texts(table, name) for name in used), strict=True))) if used else (),
        groups=_texts(table, group_by) if group_by else (),
        draft=_draft(table, names, questions, f"{direct}_answer"),
    )


def _read(path: Path) -> Any:
    try:
        import pyarrow.csv
        import pyarrow.json
        import pyarrow.parquet as pq
    except ImportError as missing:
        raise MissingDependencyError(
            f"Reading outcome tables needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    readers = {
        ".parquet": pq.read_table,
        ".csv": _read_csv,
        ".jsonl": pyarrow.json.read_json,
    }
    if path.suffix not in readers:
        raise ConfigurationError(f"{str(path)!r} is none of {sorted(readers)!r}: convert it, or rename it if it is.")
    try:
        table = readers[path.suffix](path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{str(path)!r} can't be read as {path.suffix!r}: {error}") from error
    if not table.num_rows:
        raise InputError(f"{str(path)!r} has no rows; record some outcomes first.")
    return table


def _read_csv(path: Path) -> Any:
    """Columns of numbers are read as numbers; all others stay the text that they are: an id "007" is not 7."""
    import pyarrow as pa
    import pyarrow.csv

    multiline = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(path, parse_options=multiline) as file:
        texts = {name: pa.string() for name in file.schema.names if not _holds_numbers(name)}
    return pyarrow.csv.read_csv(
        path, parse_options=multiline, convert_options=pyarrow.csv.ConvertOptions(column_types=texts)
    )


def _holds_numbers(name: str) -> bool:
    return name.endswith(("_correct", "_cost", "_seconds")) or (name.startswith("draft_") and name != "draft_answer")


def _check_columns(names: Sequence[str], branches: Mapping[str, str], extra: Sequence[str]) -> None:
    recorded = sorted(name.removesuffix("_correct") for name in names if name.endswith("_correct"))
    if "question" not in names:
        raise InputError(f"The table has no column 'question'; it has {names!r}. Rename the one with the questions.")
    if not recorded:
        raise InputError(
            f"The table has no branches: no column ends in '_correct' among {names!r}. Record for each question "
            "whether the direct answer was right and whether each tool's was, in 0..1."
        )
    if len(branches) < 2:
        raise ConfigurationError(f"No tool is named; name one with --tool NAME=BRANCH, of the branches {recorded!r}.")
    for action, branch in branches.items():
        if branch not in recorded:
            option = "--direct" if action == DIRECT else f"--tool {action}="
            raise ConfigurationError(
                f"{option} names the branch {branch!r}, and the table has no column '{branch}_correct'. Its "
                f"branches are {recorded!r}."
            )
    for name in extra:
        if name not in names:
            raise ConfigurationError(f"The table has no column {name!r}; it has {names!r}.")


def _texts(table: Any, name: str) -> tuple[str, ...]:
    return tuple("" if value is None else str(value) for value in table.column(name).to_pylist())


def _numbers(table: Any, name: str) -> NDArray[np.float64]:
    try:
        values = table.column(name).to_pylist()
        return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Column {name!r} holds something that is no number: {error}.") from error


def _stack(
    table: Any, branches: Mapping[str, str], what: str, default: Sequence[float] | None = None
) -> NDArray[np.float64]:
    columns = []
    for index, branch in enumerate(branches.values()):
        if f"{branch}_{what}" in table.column_names or default is None:
            columns.append(_numbers(table, f"{branch}_{what}"))
        else:
            columns.append(np.full(table.num_rows, default[index]))
    return np.stack(columns, axis=1)


def _draft(table: Any, names: Sequence[str], questions: Sequence[str], answers: str) -> dict[str, NDArray[np.float64]]:
    numeric = [
        name
        for name in names
        if name.startswith("draft_") and _holds_numbers(name) and _is_numeric(table.schema.field(name).type)
    ]
    columns = {name: _numbers(table, name) for name in numeric}
    for name, column in columns.items():
        if np.isinf(column).any():
            raise InputError(f"Column {name!r} holds an infinite number; leave a cell empty where there is none.")
    if "draft_answer" in names:
        drafts = table.column("draft_answer").to_pylist()
        rows = [
            None if text is None else draft_text_features(q, str(text))
            for q, text in zip(questions, drafts, strict=True)
        ]
        columns |= _from_rows(rows)
        if answers in names:
            pairs = zip(drafts, table.column(answers).to_pylist(), strict=True)
            columns |= _from_rows([None if a is None else agreement(str(a), str(b or "")) for a, b in pairs])
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def _from_rows(rows: Sequence[Mapping[str, float] | None]) -> dict[str, NDArray[np.float64]]:
    names = next((list(row) for row in rows if row is not None), [])
    return {name: np.array([np.nan if row is None else row[name] for row in rows], dtype=np.float64) for name in names}


def _is_numeric(type_: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(type_) or types.is_floating(type_) or types.is_boolean(type_))
