"""`metis report`: recorded runs as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.errors import ConfigurationError
from metis_agent.types import Trajectory

__all__ = ["report_command"]


def report_command(
    store: Annotated[str, typer.Option(help="Folder or URL of the trajectories to report on.")],
    before: Annotated[
        str | None,
        typer.Option(
            help="Those to compare with. Without it: the runs of --store that were forced to call a tool, if any."
        ),
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="A gate's folder: its threshold and its frontier.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="What `metis evaluate gate --json` wrote: frontier and calibration.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="History of a training, such as metrics.json of `metis demo`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    json: JsonOption = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Metis report",
    decisions: Annotated[
        int,
        typer.Option(
            min=0, help="Runs that the page carries at most; of a larger store a fair sample, and it says so."
        ),
    ] = 20_000,
) -> None:
    """Show what was saved and what it cost in accuracy: one page to open in a browser, or to send to somebody.

    The page is a single file that loads nothing. Besides the figures it carries the runs themselves, to be filtered
    and read.

    Example: metis report --store runs/demo/trajectories/hdpo --before runs/demo/trajectories/cold_start
    --history runs/demo/metrics.json --out report.html

    Example: metis report --store runs --gate my-gate --evaluation figures.json
    """
    console = screen(json)
    if json is not None and json.resolve() == out.resolve():
        raise ConfigurationError(f"--out and --json are both {str(out)!r}: give two names.")
    with training_libraries():
        from metis_agent.report.facts import ReportInputs
        from metis_agent.report.page import write_report

    inputs = ReportInputs(
        store=store, before=before, gate=gate, evaluation=evaluation, history=history, decisions=decisions
    )
    with progress_bars(console) as bars:

        def shown(said: str, runs: Iterator[Trajectory], total: int) -> Iterator[Trajectory]:
            yield from bars.track(runs, total=total, description=said)

        facts = write_report(inputs, out, title=title, progress=shown)
    if json is not None:
        write_json(json, facts.to_dict())
    for kept in facts.kept:
        if kept.bad_lines:
            console.print(f"{kept.bad_lines:,} lines of {kept.url} could not be read; the report says so.")
    console.print(f"Report: {out} ({out.stat().st_size / 1e6:.1f} MB, {len(facts.archive):,} runs to look at)")
