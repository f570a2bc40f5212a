"""`metis train gate`: a gate from recorded outcomes, with the figures that it earned on held-out folds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from metis_agent.cli.outcome_options import (
    ContextOption,
    DirectOption,
    GroupOption,
    JsonOption,
    OutcomesOption,
    SeedOption,
    ToolOption,
    load_table,
    progress_bars,
    write_json,
)

__all__ = ["train_app", "train_gate_command"]

train_app = typer.Typer(help="Train from records.", no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Train from records."""


@train_app.command("gate")
def train_gate_command(
    outcomes: OutcomesOption,
    tool: ToolOption,
    out: Annotated[Path, typer.Option("--out", help="Folder for the gate: load it with PolicyGate(FOLDER).")],
    direct: DirectOption = "direct",
    context: ContextOption = None,
    group_by: GroupOption = None,
    policy: Annotated[
        Literal["features"], typer.Option(help="What reads the questions. 'features' needs no download.")
    ] = "features",
    beta: Annotated[
        float, typer.Option(help="Accuracy that may be given up on a question to save a call, at most.")
    ] = 0.02,
    folds: Annotated[int, typer.Option(min=2, help="Folds for the held-out estimates.")] = 5,
    describe: Annotated[
        list[str] | None, typer.Option("--describe", help="NAME=TEXT: a tool's description, kept with the gate.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Train a gate that decides, question by question, whether a tool is worth calling.

    It learns from what came of each question with and without the tool; no model is called.

    Example: metis train gate --outcomes runs.parquet --direct direct --tool text_search=search --out my-gate

    Next: metis evaluate gate my-gate --outcomes held-out.parquet ..., then metis calibrate my-gate ... for a
    threshold that keeps a promise.
    """
    console = Console()
    table = load_table(outcomes, direct, tool, context, group_by)
    from metis_agent.hdpo.export import write_artefact
    from metis_agent.hdpo.gate_evaluation import Scored, evaluate_gate
    from metis_agent.hdpo.gate_trainer import GateTraining, train_gate
    from metis_agent.hdpo.policies.features import FeaturesPolicy

    table.check_trainable()
    kind = {"features": FeaturesPolicy}[policy]
    with progress_bars(console) as bars:
        read = bars.add_task("read the questions", total=len(table))
        fit = bars.add_task("fit", total=None)
        gate = train_gate(
            table,
            GateTraining(beta=beta, folds=folds, seed=seed),
            policy=kind(progress=lambda count: bars.advance(read, count)),
            progress=lambda _, done, total: bars.update(fit, completed=done, total=total),
        )
    scored = Scored(direct_right=gate.accuracy[:, 0], probabilities=gate.probabilities)
    figures = evaluate_gate(scored, table, 0.5, resamples=200, seed=seed)
    descriptions = dict(text.partition("=")[::2] for text in describe or [])
    write_artefact(gate, out, table=table, metrics=figures, descriptions=descriptions)
    show_figures(console, figures, "Held-out folds of the training table")
    console.print(f"Gate: {out}   load it with PolicyGate({str(out)!r})")
    if json is not None:
        write_json(json, figures)


def show_figures(console: Console, figures: dict[str, object], title: str) -> None:
    """The figures of `evaluate_gate`, as a table."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for heading in ("", "AUC", "accuracy at half of the calls", "accuracy"):
        shown.add_column(heading, justify="left" if not heading else "right")
    at = figures["at_threshold"]
    baselines = figures["baselines"]
    if not isinstance(at, dict) or not isinstance(baselines, dict):
        return
    shown.add_row("gate", _cell(figures, "auc"), _cell(figures, "accuracy_at_half"), _cell(at, "accuracy"))
    for name, row in baselines.items():
        shown.add_row(name, _cell(row, "auc"), _cell(row, "accuracy_at_half"), _cell(row, "accuracy"))
    console.print(shown)
    console.print(
        f"At the threshold {at['threshold']:.3f}: a tool on {at['tool_rate']:.1%} of the questions; "
        f"redundant {at['redundant']:.1%}, harmful {at['harmful']:.1%}, necessary {at['necessary']:.1%}, "
        f"missed {at['missed']:.1%}."
    )


def _cell(row: dict[str, object], name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_interval")
    if not isinstance(value, float):
        return ""
    return f"{value:.3f}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if isinstance(interval, list) else "")
