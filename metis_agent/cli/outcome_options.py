"""Options that every command on outcomes shares, in one place, and how the outcomes are read.

Outcomes come from a table (`--outcomes`) or from the trajectories of a store (`--store`). A command asks for them by
a parameter `records`, and `takes_records` puts the options in its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from metis_agent.cli.judging_options import JudgeOption, RubricOption, VerifierOption, verify_with
from metis_agent.cli.output import progress_bars, training_libraries
from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from metis_agent.rollouts.outcomes import OutcomeTable
    from metis_agent.types import Trajectory

__all__ = ["Records", "SeedOption", "runs_of", "takes_records"]

SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]
VERDICTS = "verdicts.sqlite"
"""File of a store in which a judge's verdicts are kept."""
_TABLE, _STORE = "Outcomes from a table", "Outcomes from a store"


@dataclass(frozen=True, kw_only=True)
class Records:
    """Where outcomes come from; each field is an option of every command that takes them."""

    outcomes: Annotated[
        Path | None,
        typer.Option(
            help="Table with a row a question (.parquet, .csv, .jsonl): 'question', for each branch "
            "'<branch>_correct' in 0..1, optional 'context', '<branch>_cost', '<branch>_seconds', '<branch>_answer' "
            "and 'draft_*'.",
            rich_help_panel=_TABLE,
        ),
    ] = None
    tool: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=BRANCH: the agent's tool and its branch in the table; repeat for more. With --store NAME alone; "
            "by default all tools that were recorded."
        ),
    ] = None
    direct: Annotated[str, typer.Option(help="Branch of the answers without a tool.", rich_help_panel=_TABLE)] = (
        "direct"
    )
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with what came along with the question (a table, a passage); repeat to join several. By "
            "default those of 'context', 'table', 'text' and 'passage' that are there.",
            rich_help_panel=_TABLE,
        ),
    ] = None
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Column whose rows stay on one side of every split, such as the document asked about; with --store a "
            "further column of the questions' file."
        ),
    ] = None
    store: Annotated[
        str | None,
        typer.Option(help="Folder or URL of recorded trajectories: see `metis rollout`.", rich_help_panel=_STORE),
    ] = None
    of_model: Annotated[
        str | None, typer.Option(help="Only runs of this model, as it was named then.", rich_help_panel=_STORE)
    ] = None
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Read what direct runs show of themselves: the gate will then ask for a direct draft before it "
            "decides.",
            rich_help_panel=_STORE,
        ),
    ] = False
    declared_cost: Annotated[
        bool,
        typer.Option(
            "--declared-cost",
            help="A tool costs what it declares (metadata={'cost': ...}); by default 1 a call.",
            rich_help_panel=_STORE,
        ),
    ] = False

    verifier: VerifierOption = None
    judge: JudgeOption = None
    judge_rubric: RubricOption = None

    def load(self, console: Console, *, tools: Sequence[str] | None = None) -> OutcomeTable:
        """Read them.

        Args:
            console: Says what was read, and what was left out.
            tools: Names of the tools where the options give none, such as those of a gate.

        Raises:
            MissingDependencyError: the `train` extra is not installed.
            ConfigurationError: not one source, or a --tool that does not fit it.
            InputError: see `read_outcomes` and `OutcomePool`.
        """
        if (self.outcomes is None) == (self.store is None):
            raise ConfigurationError(
                f"--outcomes is {self.outcomes!r} and --store {self.store!r}: give one of them, a table of outcomes or "
                "a store of trajectories."
            )
        with training_libraries():
            if self.outcomes is not None:
                from metis_agent.rollouts.outcome_files import read_outcomes

                return read_outcomes(
                    self.outcomes, direct=self.direct, tools=self._branches(), context=self.context or None,
                    group_by=self.group_by,
                )  # fmt: skip
            return self._pool(console, tools)

    def other(self, outcomes: Path) -> Records:
        """The same options on another table."""
        return Records(**{**self.__dict__, "outcomes": outcomes, "store": None})

    def _branches(self) -> dict[str, str]:
        branches: dict[str, str] = {}
        for text in self.tool or []:
            name, equals, branch = text.partition("=")
            if not (name and equals and branch) or name in branches:
                raise ConfigurationError(
                    f"--tool {text!r}: write NAME=BRANCH, each name once, as in --tool text_search=search."
                )
            branches[name] = branch
        return branches

    def _pool(self, console: Console, tools: Sequence[str] | None) -> OutcomeTable:
        from metis_agent.rollouts.recorded import OutcomePool

        names = self.tool or tools
        if names and (bad := [name for name in names if "=" in name or names.count(name) > 1]):
            raise ConfigurationError(f"--tool {bad[0]!r}: with --store write the tool's name alone, each once.")
        url = str(self.store)
        verify = verify_with(
            self.verifier, self.judge, self.judge_rubric, cache=None if "://" in url else Path(url) / VERDICTS
        )
        pool = OutcomePool(
            tools=names, verify=verify, use_cost=self.declared_cost, draft=self.draft, group_by=self.group_by,
            model=self.of_model, trust_verdicts=self.verifier is not None,
        )  # fmt: skip
        pool.extend(runs_of(str(self.store), console, whole=self.draft))
        table = pool.table()
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in table.dropped.items())
        console.print(
            f"{pool.runs:,} runs: {len(table):,} questions down all of {escape(', '.join(table.actions))}."
            + (f" Left out: {left_out}." if left_out else "")
        )
        return table


def takes_records(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its parameter `records`, the options of `Records`."""
    own = inspect.signature(command, eval_str=True)
    hints = get_type_hints(Records, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Records)
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        records = Records(**{field.name: given.pop(field.name) for field in fields(Records)})
        command(records=records, **given)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "records"
    ]
    with_options.__signature__ = own.replace(parameters=[*kept, *shared])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *shared]}
    del with_options.__wrapped__  # the options are its own
    return with_options


def runs_of(url: str, console: Console, *, whole: bool = False) -> Iterator[Trajectory]:
    """The trajectories of a store, with a bar; says at the end how many lines were bad.

    Messages and model calls, which scoring does without, come only where they are asked for (`whole`).
    """
    from metis_agent.recording.store import TrajectoryStore

    store = TrajectoryStore(url, read_only=True)
    with progress_bars(console) as bars:
        yield from bars.track(store.read(whole=whole), total=store.count(), description="read the store")
    if bad := store.report.torn + store.report.corrupt:
        first = store.report.bad_lines[0]
        console.print(f"{bad} lines of the store could not be read; the first: {first.shard} line {first.line}.")
