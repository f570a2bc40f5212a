"""Outcome tables from files, of any format that `tables` reads.

Only the columns that are used are kept, and what is wrong with a file is said before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.gates.features import agreement, draft_text_features
from metis_agent.rollouts.outcomes import DIRECT, OutcomeTable
from metis_agent.rollouts.tables import read_rows

__all__ = ["CONTEXT_COLUMNS", "read_outcomes"]

CONTEXT_COLUMNS = ("context", "table", "text", "passage")
"""Columns taken as the question's context where none are named."""

Columns = Mapping[str, Sequence[Any]]


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
        path: A `.parquet`, `.csv` or `.jsonl` file, or one of a registered format.
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
    table = _columns(Path(path))
    names = sorted(table)
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
        draft=_draft(table, questions, f"{direct}_answer"),
    )


def _columns(path: Path) -> dict[str, list[Any]]:
    """The table by column; an entry is `None` where a row has none, or in a CSV an empty one where a number belongs."""
    columns: dict[str, list[Any]] = {}
    rows = 0
    for row in read_rows(path):
        for name in row.keys() - columns.keys():
            columns[name] = [None] * rows
        for name, column in columns.items():
            column.append(row.get(name))
        rows += 1
    if not rows:
        raise InputError(f"{str(path)!r} has no rows; record some outcomes first.")
    return columns


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


def _texts(table: Columns, name: str) -> tuple[str, ...]:
    return tuple("" if value is None else str(value) for value in table[name])


def _numbers(table: Columns, name: str) -> NDArray[np.float64]:
    try:
        return np.array([np.nan if value in (None, "") else float(value) for value in table[name]], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Column {name!r} holds something that is no number: {error}.") from error


def _stack(
    table: Columns, branches: Mapping[str, str], what: str, default: Sequence[float] | None = None
) -> NDArray[np.float64]:
    columns = []
    for index, branch in enumerate(branches.values()):
        if f"{branch}_{what}" in table or default is None:
            columns.append(_numbers(table, f"{branch}_{what}"))
        else:
            columns.append(np.full(len(table["question"]), default[index]))
    return np.stack(columns, axis=1)


def _draft(table: Columns, questions: Sequence[str], answers: str) -> dict[str, NDArray[np.float64]]:
    columns = {name: _numbers(table, name) for name in sorted(table) if _is_draft_number(name, table[name])}
    for name, column in columns.items():
        if np.isinf(column).any():
            raise InputError(f"Column {name!r} holds an infinite number; leave a cell empty where there is none.")
    if "draft_answer" in table:
        drafts = table["draft_answer"]
        rows = [
            None if text is None else draft_text_features(q, str(text))
            for q, text in zip(questions, drafts, strict=True)
        ]
        columns |= _from_rows(rows)
        if answers in table:
            pairs = zip(drafts, table[answers], strict=True)
            columns |= _from_rows([None if a is None else agreement(str(a), str(b or "")) for a, b in pairs])
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def _is_draft_number(name: str, column: Sequence[Any]) -> bool:
    if not name.startswith("draft_") or name == "draft_answer":
        return False
    try:
        return bool([float(value) for value in column if value not in (None, "")])
    except (TypeError, ValueError):
        return False


def _from_rows(rows: Sequence[Mapping[str, float] | None]) -> dict[str, NDArray[np.float64]]:
    names = next((list(row) for row in rows if row is not None), [])
    return {name: np.array([np.nan if row is None else row[name] for row in rows], dtype=np.float64) for name in names}
