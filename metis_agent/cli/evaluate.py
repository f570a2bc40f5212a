"""`metis evaluate gate`: a trained gate on questions that it has not seen, beside its baselines.

Its neighbour `metis evaluate benchmark` is in `cli.benchmark`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from metis_agent.cli.benchmark import evaluate_benchmark_command
from metis_agent.cli.calibrate import DropSeenOption, ask_gate, report_drift
from metis_agent.cli.output import JsonOption, screen, write_json
from metis_agent.cli.train import show_figures
from metis_agent.cli.training_options import Records, SeedOption, takes_settings
from metis_agent.errors import MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.evaluation.gates import Scored
    from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["evaluate_app", "evaluate_gate_command"]


class _WithBenchmarkOption(TyperGroup):
    """`metis evaluate --benchmark NAME ...` is `metis evaluate benchmark NAME ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name first where the option stands for it."""
        if args and args[0].startswith("-"):
            for place, word in enumerate(args):
                option, equals, name = word.partition("=")
                if option == "--benchmark" and (equals or place + 1 < len(args)):
                    rest = [*args[:place], *args[place + (1 if equals else 2) :]]
                    args = ["benchmark", name if equals else args[place + 1], *rest]
                    break
        return super().parse_args(ctx, args)


evaluate_app = typer.Typer(help="Measure what was trained.", no_args_is_help=True, cls=_WithBenchmarkOption)


@evaluate_app.callback()
def _evaluate(
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help="With its options, the same as the command 'benchmark NAME'.")
    ] = None,
) -> None:
    """Measure a gate on your own questions, or any model on a public benchmark."""
    # By now `_WithBenchmarkOption` has made a command of it; here it is only listed.


@evaluate_app.command("gate")
@takes_settings
def evaluate_gate_command(
    records: Records,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The gate's folder.")],
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Try another threshold than the gate's own.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Table that the supervised baselines are fitted on; by default folds of --outcomes itself."),
    ] = None,
    drop_seen: DropSeenOption = False,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Measure a gate: the area under accuracy and calls, budgets, calibration, and what it does at its threshold.

    Beside it: never, always, random, oracle, and supervised baselines. The area is the mean accuracy over all budgets
    of calls, each spent where the gate sees most need; AUC is of "the direct answer is right". Intervals are 95%. It
    also says whether these questions are like those it was calibrated on.

    Example: metis evaluate gate my-gate --store runs --drop-seen

    Example: metis evaluate gate my-gate --outcomes held-out.parquet --tool text_search=search --json figures.json
    """
    console = screen(json)
    from metis_agent.gates.policy import PolicyGate

    gate = PolicyGate(folder, threshold=threshold)
    table = records.load(console, tools=gate.artefact.tools, every_step=gate.every_step)
    from metis_agent.evaluation.gates import evaluate_gate

    table, scored = ask_gate(gate, table, console, drop_seen=drop_seen)
    try:
        fitted_on = records.other(train).load(console) if train else None
        # Of when to stop, the question alone says too little to compare with; caps and the oracle stand beside it.
        baselines = {} if table.runs else _baselines(table, fitted_on, seed)
    except MissingDependencyError as missing:
        console.print(str(missing))
        baselines = {}
    figures = evaluate_gate(scored, table, gate.threshold, baselines=baselines, seed=seed)
    show_figures(console, figures)
    figures["drift"] = report_drift(console, gate.artefact, scored)
    if json is not None:
        write_json(json, figures)


evaluate_app.command("benchmark")(evaluate_benchmark_command)


def _baselines(table: OutcomeTable, train: OutcomeTable | None, seed: int) -> dict[str, Scored]:
    """Fitted on `train`, or on four fifths of the table to score the fifth."""
    import numpy as np

    from metis_agent.evaluation.comparison import supervised_baselines
    from metis_agent.evaluation.gates import merge_folds

    if train is not None:
        return supervised_baselines(train, table)
    try:
        fold = table.folds(5, seed)
        parts = []
        for held_out in range(5):
            rows = np.flatnonzero(fold == held_out)
            parts.append((rows, supervised_baselines(table.take(np.flatnonzero(fold != held_out)), table.take(rows))))
    except ValueError:
        # Too few groups, or a fold with one outcome only: there is nothing to fit.
        return {}
    return merge_folds(len(table), parts)
