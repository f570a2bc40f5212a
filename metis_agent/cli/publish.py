"""What others get to see: `metis report`'s page of recorded runs, `metis push`'s gate or model with its card."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from metis_agent.cli.output import JsonOption, progress_bars, screen, training_libraries, write_json
from metis_agent.errors import ConfigurationError, InputError
from metis_agent.types import Trajectory

__all__ = ["push_command", "report_command"]


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


def push_command(
    folder: Annotated[Path, typer.Argument(help="What `metis train` wrote: a gate, or a model's folder.")],
    repo: Annotated[str, typer.Option(help="owner/name; made, as a private one, where it is not there.")],
    figures: Annotated[
        Path | None,
        typer.Option(
            help="What `metis evaluate gate --json` wrote; of a gate by default the figures it was exported with."
        ),
    ] = None,
    measured_on: Annotated[str, typer.Option(help="In words, what the figures are of.")] = "",
    data: Annotated[
        list[Path] | None, typer.Option(help="A file it was trained on: the card has its SHA-256; repeat for more.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="An identifier such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="owner/name of the model that it was trained from.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; the main one by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the card and the files, and send nothing.")] = False,
) -> None:
    """Publish a gate or a model with a card: what was measured, on which data, what is promised, how to load it.

    Of a gate go the files that its gate.json names, of a model its weights as safetensors, configuration and tokenizer.
    Log in first with `hf auth login`, or set HF_TOKEN. Look at the card with --dry-run: the descriptions of your tools
    are in it.

    Example: metis push my-gate --repo me/my-gate --license apache-2.0 --dry-run

    Example: metis push my-gate --repo me/my-gate --figures figures.json --measured-on "800 questions of May"
    """
    from metis_agent.publish import CardFacts, push_to_hub

    console = screen(None)
    facts = CardFacts(
        license=license, base_model=base_model, figures=_figures(figures), measured_on=measured_on,
        data=tuple(data or ()),
    )  # fmt: skip
    done = push_to_hub(folder, repo, facts=facts, private=not public, revision=revision, dry_run=dry_run)
    if dry_run:
        console.print(done.card, markup=False, highlight=False, soft_wrap=True)
    for path in done.files:
        console.print(f"{path.name}  {path.stat().st_size:,} bytes", markup=False, highlight=False)
    if done.left_out:
        console.print(f"Not part of it: {', '.join(done.left_out)}", markup=False, highlight=False)
    if dry_run:
        console.print(f"Nothing was sent. Without --dry-run this goes to {repo}.", markup=False, highlight=False)
    else:
        console.print(f"Pushed: {done.url}   commit {done.commit}", markup=False, highlight=False, soft_wrap=True)


def _figures(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json_module.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--figures {str(path)!r} can't be read ({error}); give what --json wrote.") from error
    if not isinstance(found, dict):
        raise InputError(
            f"--figures {str(path)!r} holds {type(found).__name__}, not an object; give what --json wrote."
        )
    return found
