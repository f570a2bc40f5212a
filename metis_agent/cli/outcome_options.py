"""Options that every command on outcome tables shares, and how they are read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from metis_agent.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.hdpo.outcomes import OutcomeTable

__all__ = [
    "ContextOption",
    "DirectOption",
    "GroupOption",
    "JsonOption",
    "OutcomesOption",
    "SeedOption",
    "ToolOption",
    "load_table",
    "progress_bars",
    "write_json",
]

OutcomesOption = Annotated[
    Path,
    typer.Option(
        "--outcomes",
        help="Table with a row a question (.parquet, .csv, .jsonl): 'question', for each branch '<branch>_correct' "
        "in 0..1, optional 'context', '<branch>_cost', '<branch>_seconds', '<branch>_answer' and 'draft_*'.",
    ),
]
DirectOption = Annotated[str, typer.Option("--direct", help="Branch of the answers without a tool.")]
ToolOption = Annotated[
    list[str],
    typer.Option("--tool", help="NAME=BRANCH: the agent's tool and its branch in the table; repeat for more."),
]
ContextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        help="Column with what came along with the question (a table, a passage); repeat to join several. By default "
        "those of 'context', 'table', 'text' and 'passage' that are there.",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option(
        "--group-by", help="Column whose rows stay on one side of every split, such as the document asked about."
    ),
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write all figures to this file.")]


def load_table(
    outcomes: Path, direct: str, tool: list[str], context: list[str] | None, group_by: str | None
) -> OutcomeTable:
    """Read the table that the options name.

    Raises:
        MissingDependencyError: the `train` extra is not installed.
        ConfigurationError: a --tool is no NAME=BRANCH, or given twice.
        InputError: see `read_outcomes`.
    """
    # Thread pools read this when numpy is imported; one thread is quickest for sparse work.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from metis_agent.hdpo.outcome_files import read_outcomes
    except ImportError as missing:
        raise MissingDependencyError(
            f"this command needs {missing.name!r}; install it with: pip install 'metis-agent[train]'"
        ) from missing
    tools: dict[str, str] = {}
    for text in tool:
        name, equals, branch = text.partition("=")
        if not (name and equals and branch) or name in tools:
            raise ConfigurationError(
                f"--tool {text!r}: write NAME=BRANCH, each name once, as in --tool text_search=search."
            )
        tools[name] = branch
    return read_outcomes(outcomes, direct=direct, tools=tools, context=context or None, group_by=group_by)


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Bars with counts and times."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Whole or not at all, and valid JSON: what could not be measured is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(_no_nan(figures), indent=2, default=float, allow_nan=False) + "\n")
    draft.replace(path)


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _no_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
