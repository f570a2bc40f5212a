"""`metis calibrate`: a threshold for a promise, from records that the gate was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from metis_agent.cli.drift import report_drift
from metis_agent.cli.gate_scores import DropSeenOption, ask_gate
from metis_agent.cli.outcome_options import Records, SeedOption, takes_records
from metis_agent.cli.output import JsonOption, screen, write_json
from metis_agent.errors import ConfigurationError

__all__ = ["calibrate_command"]


@takes_records
def calibrate_command(
    records: Records,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder; its threshold is replaced.")],
    accuracy_loss: Annotated[
        float | None,
        typer.Option(help="Promise: at most this much accuracy lost against always calling; 0.01 is one point."),
    ] = None,
    calls: Annotated[float | None, typer.Option(help="Promise: at most this many calls a question.")] = None,
    cost_per_1000: Annotated[
        float | None, typer.Option(help="Promise: at most this cost for 1,000 questions; needs --highest-cost.")
    ] = None,
    highest_cost: Annotated[float | None, typer.Option(help="What one question can cost at most.")] = None,
    confidence: Annotated[float, typer.Option(help="How sure the promise is to hold.")] = 0.95,
    ahead: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the promise over the next so many questions as well (groups, with --group-by), not in the long "
            "run alone: surer, and fewer calls saved.",
        ),
    ] = None,
    drop_seen: DropSeenOption = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Choose the gate's threshold so that a promise holds for new questions like these, and write it to the gate.

    Refused where these records can't support the promise: then record more, or promise less. With --group-by the
    questions of one group count as one record, for they may be won and lost together.

    The scores of these questions are kept with the gate, so that `metis drift` can tell when others come.

    Example: metis calibrate my-gate --store runs --drop-seen --accuracy-loss 0.03

    Example: metis calibrate my-gate --outcomes held-out.parquet --tool text_search=search --accuracy-loss 0.01
    """
    console = screen(json)
    from metis_agent.gates.policy import PolicyGate

    gate = PolicyGate(folder)
    table = records.load(console, tools=gate.artefact.tools)
    from metis_agent.evaluation.calibration import Promise, choose_threshold
    from metis_agent.evaluation.drift import reference_note
    from metis_agent.hdpo.export import set_threshold

    delta = round(1 - confidence, 12)
    wanted = {"accuracy_loss": accuracy_loss, "calls": calls, "cost": cost_per_1000}
    promises = [
        Promise(kind="accuracy_loss", limit=accuracy_loss, delta=delta) if accuracy_loss is not None else None,
        Promise(kind="calls", limit=calls, delta=delta) if calls is not None else None,
        Promise(kind="cost", limit=cost_per_1000 / 1000, delta=delta, highest=highest_cost)
        if cost_per_1000 is not None
        else None,
    ]
    stated = [promise for promise in promises if promise is not None]
    if len(stated) != 1:
        raise ConfigurationError(
            f"The promises are {wanted!r}: state exactly one, with --accuracy-loss, --calls or --cost-per-1000."
        )
    table, scored = ask_gate(gate, table, console, drop_seen=drop_seen)
    threshold = choose_threshold(
        scored.probabilities, table.correct, table.cost, stated[0], groups=table.groups, ahead=ahead, seed=seed
    )
    found = report_drift(console, gate.artefact, scored)
    set_threshold(folder, {**threshold.note(), "reference": reference_note(scored, gate.artefact.tools)})
    console.print(
        f"Threshold {threshold.value:.4f}: {threshold.note()['chosen']}.\nOn these records: a tool on "
        f"{threshold.tool_rate:.1%} of the questions, accuracy {threshold.accuracy:.3f}."
    )
    if json is not None:
        write_json(json, {**threshold.note(), "drift": found})
