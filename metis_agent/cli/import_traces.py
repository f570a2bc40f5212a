"""`metis import`: other people's traces into the trajectory store."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from metis_agent.cli.output import JsonOption, RayOption, screen, write_json

if TYPE_CHECKING:
    from metis_agent.traces import ImportProgress, ImportReport

__all__ = ["import_command"]

_SHOWN = 8


def import_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Files (.jsonl, .json, .parquet, each also .gz), folders, patterns, fsspec URLs; or a LangGraph "
            "checkpointer: a SQLite file, postgresql://user@host/database.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or URL for the trajectories; made where it isn't there.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="The format, see --formats; by default what the first records look like.", show_default=False
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="A value to take out wherever it stands; may be given several times.", show_default=False),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="A regular expression; what it matches is taken out.", show_default=False),
    ] = None,
    ray: RayOption = None,
    formats: Annotated[bool, typer.Option("--formats", help="List the formats that can be read, and stop.")] = False,
    json: JsonOption = None,
) -> None:
    """Read traces of any agent into a store of trajectories: what `metis audit` and `metis train gate` work on.

    Each turn of a conversation is one trajectory, with its messages, tool calls and results, tokens, times, errors,
    images, conversation and user. The same trace twice is one. Secrets (what looks like a key, a token or a password,
    and those that this environment holds) are taken out on the way in. What can't be read is kept in a file with the
    reason, and counted.

    The export may be larger than memory. Stop it at any time and run the same command to go on.

    Example: metis import runs.jsonl --store runs

    So too: metis import exports/*.parquet --store runs; metis import checkpoints.sqlite --store runs

    Next: metis audit --store runs
    """
    console = screen(json)
    from metis_agent.traces import import_traces

    if formats:
        _list_formats(console)
        return
    if not sources or not store:
        raise typer.BadParameter("give at least one SOURCE, and --store FOLDER for the trajectories.")
    import os

    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.tools.redaction import Redactor

    redactor = Redactor(secrets=secret or (), patterns=pattern or (), environment=os.environ)
    with TrajectoryStore(store) as kept, _bars(console) as bars:
        tasks: dict[str, object] = {}

        def show(progress: ImportProgress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total or None, counts="")
            counts = f"{progress.records:,} records, {progress.trajectories:,} turns, {progress.rejected:,} rejected"
            bars.update(tasks[progress.stage], completed=progress.done, counts=counts)  # type: ignore[arg-type]

        report = import_traces(sources, kept, format=format, redactor=redactor, progress=show, ray=ray)
    _show(console, report, store)
    if json is not None:
        write_json(json, asdict(report))


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[counts]}"), console=console,
    )  # fmt: skip


def _show(console: Console, report: ImportReport, store: str) -> None:
    console.print(
        f"{report.records:,} {report.format} records, {report.traces:,} traces: {report.trajectories:,} turns with "
        f"{report.tool_calls:,} tool calls are in {store}, in {report.seconds:,.1f} s."
    )
    if report.failed:
        console.print(f"{report.failed:,} of them failed or broke off: they are marked so.")
    if report.duplicates:
        console.print(f"{report.duplicates:,} turns were there already.")
    for what, count in [*report.handled.items()][:_SHOWN]:
        console.print(f"Handled: {count:,} x {what}.", highlight=False)
    if report.rejected:
        console.print(f"[bold yellow]{report.rejected:,} could not be read[/]; they are kept in {report.rejects}:")
        for reason, count in [*report.reasons.items()][:_SHOWN]:
            console.print(f"  {count:,} x {reason}", highlight=False, markup=False)
        if len(report.reasons) > _SHOWN:
            console.print(f"  and {len(report.reasons) - _SHOWN} more reasons")
    if report.trajectories or report.duplicates:
        console.print(f"Next: metis audit --store {store}")


def _list_formats(console: Console) -> None:
    from metis_agent.traces.registry import importer, importer_names

    table = Table(title="Formats", title_justify="left")
    for heading in ("--format", "what it is", "written for", "documented at"):
        table.add_column(heading, overflow="fold")
    for name in importer_names():
        one = importer(name)
        table.add_row(name, one.title, one.versions, one.source)
    console.print(table)
