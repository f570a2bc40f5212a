"""`metis train gate`: a gate from recorded outcomes, with the figures that it earned on held-out folds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from metis_agent.cli.outcome_options import Records, SeedOption, takes_records
from metis_agent.cli.output import JsonOption, progress_bars, screen, write_json
from metis_agent.cli.policy_options import (
    BatchSizeOption,
    DeviceOption,
    EpochsOption,
    LearningRateOption,
    LoraOption,
    ModelOption,
    PolicyChoice,
    PolicyOption,
    forget_training,
)
from metis_agent.cli.train_policy import train_policy_command
from metis_agent.cli.train_sft import train_sft_command

if TYPE_CHECKING:
    from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["train_app", "train_gate_command"]

train_app = typer.Typer(help="Train from records.", no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Train from records."""


@train_app.command("gate")
@takes_records
def train_gate_command(
    records: Records,
    out: Annotated[Path, typer.Option("--out", help="Folder for the gate: load it with PolicyGate(FOLDER).")],
    hold_out: Annotated[
        float, typer.Option(help="Share of the questions to leave out, for `evaluate` and `calibrate --drop-seen`.")
    ] = 0.0,
    policy: PolicyOption = "features",
    model: ModelOption = None,
    lora: LoraOption = False,
    epochs: EpochsOption = None,
    batch_size: BatchSizeOption = None,
    learning_rate: LearningRateOption = None,
    device: DeviceOption = None,
    beta: Annotated[
        float, typer.Option(help="Accuracy that may be given up on a question to save a call, at most.")
    ] = 0.02,
    folds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Folds for the held-out estimates: so many fits and one more.",
            show_default="5; 2 of 20,000 questions or more",
        ),
    ] = None,
    drafted: Annotated[
        bool,
        typer.Option(
            "--drafted",
            help="The gate will read a draft of every question: of those without, learn about the tools only.",
        ),
    ] = False,
    describe: Annotated[
        list[str] | None, typer.Option("--describe", help="NAME=TEXT: a tool's description, kept with the gate.")
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Train a gate that decides, question by question, whether a tool is worth calling.

    It learns from what came of each question with and without each tool; no model is called.

    Example: metis train gate --store runs --hold-out 0.4 --out my-gate

    Example: metis train gate --outcomes runs.parquet --direct direct --tool text_search=search --out my-gate

    Example: metis train gate --store runs --policy encoder --model answerdotai/ModernBERT-base --folds 3 --out my-gate

    Killed while it trains a model? The same command goes on from the last epoch.

    Next: metis calibrate my-gate ... for a threshold that keeps a promise, on questions that were held out.
    """
    console = screen(json)
    choice = PolicyChoice(
        policy=policy, model=model, lora=lora, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
        device=device,
    )  # fmt: skip
    table = records.load(console)
    from metis_agent.evaluation.gates import Scored, evaluate_gate
    from metis_agent.hdpo.export import write_artefact
    from metis_agent.hdpo.gate_trainer import GateTraining, train_gate

    table = _kept(console, table, hold_out, seed)
    table.check_trainable()
    descriptions = dict(text.partition("=")[::2] for text in describe or [])
    with progress_bars(console) as bars:
        reader = choice.build(bars, out, len(table), descriptions, seed)
        fit = bars.add_task("fit", total=None)
        gate = train_gate(
            table,
            GateTraining(beta=beta, drafted=drafted, folds=folds, seed=seed),
            policy=reader,
            progress=lambda _, done, total: bars.update(fit, completed=done, total=total),
        )
    scored = Scored(direct_right=gate.accuracy[gate.judged, 0], probabilities=gate.probabilities[gate.judged])
    figures = evaluate_gate(scored, table.take(gate.judged), 0.5, resamples=200, seed=seed)
    write_artefact(gate, out, table=table, metrics=figures, descriptions=descriptions)
    forget_training(out)
    show_figures(console, figures, "Held-out folds of the training table")
    console.print(f"Gate: {out}   load it with PolicyGate({str(out)!r})")
    if json is not None:
        write_json(json, figures)


train_app.command("sft")(train_sft_command)
train_app.command("policy")(train_policy_command)


def _kept(console: Console, table: OutcomeTable, hold_out: float, seed: int) -> OutcomeTable:
    if not hold_out:
        return table
    import numpy as np

    from metis_agent.rollouts.outcomes import held_out

    left_out = held_out(table, hold_out, seed)
    console.print(f"{int(left_out.sum()):,} of {len(table):,} questions are held out of training.")
    return table.take(np.flatnonzero(~left_out))


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
