"""`metis drift`: are today's questions like those that the gate was calibrated on? No answers are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from metis_agent.cli.outcome_options import runs_of
from metis_agent.cli.output import JsonOption, progress_bars, screen, write_json
from metis_agent.cli.training_stack import training_libraries
from metis_agent.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from metis_agent.evaluation.gates import Scored
    from metis_agent.gates.artefact import Artefact
    from metis_agent.gates.policy import PolicyGate

__all__ = ["drift_command", "report_drift"]

_MOST = 20_000
"""Questions looked at; more change nothing."""


def drift_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder.")],
    questions: Annotated[
        Path | None, typer.Option(help="Today's questions: a .jsonl, .csv or .parquet file with a column 'question'.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Or the trajectories of today's runs.")] = None,
    level: Annotated[
        float, typer.Option(min=0, max=1, help="Share of false alarms among checks without drift.")
    ] = 0.01,
    json: JsonOption = None,
) -> None:
    """Say whether today's questions are like those that the gate was calibrated on.

    Compares the gate's own scores of both (Kolmogorov-Smirnov). Exit code 3 where they differ, for use in a schedule.

    Example: metis drift my-gate --store s3://bucket/today
    """
    console = screen(json)
    if (questions is None) == (store is None):
        raise ConfigurationError(f"--questions is {questions!r} and --store {store!r}: give one of them.")
    from metis_agent.gates.policy import PolicyGate

    with training_libraries():
        gate = PolicyGate(folder)
        if gate.wants_draft:
            raise ConfigurationError(
                f"The gate in {str(folder)!r} reads a direct draft, which questions alone don't have: check it with "
                "`metis evaluate gate`, which also compares."
            )
        asked = dict.fromkeys(_asked(questions, store, console))
        found = report_drift(console, gate.artefact, _score(gate, list(asked)[:_MOST], console), level=level)
    if found is None:
        raise InputError(
            f"Nothing can be said of drift: {len(asked)} different questions (20 or more are needed), and a gate whose "
            f"threshold was set so: {gate.artefact.description['threshold'].get('chosen')!r}. Run `metis calibrate`."
        )
    if json is not None:
        write_json(json, found)
    if found["drifted"]:
        raise typer.Exit(3)


def report_drift(console: Console, artefact: Artefact, scored: Scored, *, level: float = 0.01) -> dict[str, Any] | None:
    """Say it in a line, and return it for JSON; `None` where it can't be told: too few
    questions, or a gate that was not calibrated.
    """
    from metis_agent.evaluation.drift import drift_since_calibration

    try:
        found = drift_since_calibration(artefact, scored, level=level)
    except InputError:
        return None
    if found is None:
        return None
    if found.drifted:
        console.print(
            f"[bold yellow]Drift:[/] these questions are not like those calibrated on: largest gap "
            f"{found.distance:.2f}, in how likely the {found.column} (p = {found.p_value:.2g}). The promise is for "
            "questions like those: record some of today's and calibrate again."
        )
    else:
        console.print(f"No drift: these questions score like those calibrated on (largest gap {found.distance:.2f}).")
    return asdict(found)


def _asked(questions: Path | None, store: str | None, console: Console) -> Iterator[tuple[str, str]]:
    """(question, context), as they come."""
    from metis_agent.rollouts.questions import CONTEXT, read_questions

    asked = (
        read_questions(questions) if questions is not None else (run.question for run in runs_of(str(store), console))
    )
    for question in asked:
        context = str(question.metadata.get(CONTEXT) or "")
        yield (question.text.removeprefix(context).lstrip() if context else question.text), context


def _score(gate: PolicyGate, asked: list[tuple[str, str]], console: Console) -> Scored:
    import numpy as np

    from metis_agent.evaluation.gates import Scored

    direct, tools = np.empty(len(asked)), np.empty((len(asked), len(gate.artefact.tools)))
    with progress_bars(console) as bars:
        for row, (question, context) in enumerate(bars.track(asked, description="ask the gate")):
            accuracy, probabilities = gate.score(question, context)
            direct[row], tools[row] = accuracy["direct"], list(probabilities.values())
    return Scored(direct_right=direct, probabilities=tools)
