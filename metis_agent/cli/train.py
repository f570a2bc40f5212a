"""`metis train gate`, from recorded outcomes, and `metis train sft`, the cold start, from curated trajectories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from metis_agent.cli.curate_parts import open_tools
from metis_agent.cli.output import (
    FreshOption,
    JsonOption,
    prepare_folder,
    progress_bars,
    quiet_libraries,
    screen,
    step_bar,
    training_libraries,
    write_json,
)
from metis_agent.cli.train_policy import train_policy_command
from metis_agent.cli.training_options import PolicyChoice, Records, forget_training, takes_settings
from metis_agent.hdpo.settings import GateTraining, SftSettings

if TYPE_CHECKING:
    from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["train_app", "train_gate_command", "train_sft_command"]

train_app = typer.Typer(help="Train from records.", no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Train from records."""


@train_app.command("gate")
@takes_settings
def train_gate_command(
    out: Annotated[Path, typer.Option("--out", help="Folder for the gate: load it with PolicyGate(FOLDER).")],
    records: Records,
    choice: PolicyChoice,
    training: GateTraining,
    hold_out: Annotated[
        float, typer.Option(help="Share of the questions to leave out, for `evaluate` and `calibrate --drop-seen`.")
    ] = 0.0,
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step",
            help="Of --store take the decision points that `metis rollout --every-step` recorded: the gate will decide "
            "before each round of calls whether it is enough. (A table says so itself, by its column 'run'.)",
        ),
    ] = False,
    describe: Annotated[
        list[str] | None, typer.Option("--describe", help="NAME=TEXT: a tool's description, kept with the gate.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Train a gate that decides, question by question, whether a tool is worth calling.

    It learns from what came of each question with and without each tool; no model is called.

    Example: metis train gate --store runs --hold-out 0.4 --out my-gate

    Example: metis train gate --outcomes runs.parquet --direct direct --tool text_search=search --out my-gate

    Example: metis train gate --store runs --every-step --hold-out 0.4 --out my-gate

    Example: metis train gate --store runs --policy encoder --model answerdotai/ModernBERT-base --folds 3 --out my-gate

    Killed while it trains a model? The same command goes on from the last epoch.

    Next: metis calibrate my-gate ... for a threshold that keeps a promise, on questions that were held out.
    """
    console = screen(json)
    table = records.load(console, every_step=every_step)
    from metis_agent.evaluation.gates import Scored, evaluate_gate
    from metis_agent.hdpo.export import write_artefact
    from metis_agent.hdpo.gate_trainer import train_gate

    table = _kept(console, table, hold_out, training.seed)
    table.check_trainable()
    descriptions = dict(text.partition("=")[::2] for text in describe or [])
    with progress_bars(console) as bars:
        reader = choice.build(bars, out, len(table), descriptions, training.seed)
        fit = bars.add_task("fit", total=None)
        gate = train_gate(
            table,
            training,
            policy=reader,
            progress=lambda _, done, total: bars.update(fit, completed=done, total=total),
        )
    scored = Scored(direct_right=gate.accuracy[gate.judged, 0], probabilities=gate.probabilities[gate.judged])
    figures = evaluate_gate(scored, table.take(gate.judged), 0.5, resamples=200, seed=training.seed)
    write_artefact(gate, out, table=table, metrics=figures, descriptions=descriptions)
    forget_training(out)
    show_figures(console, figures, " in held-out folds of the training table")
    console.print(f"Gate: {out}   load it with PolicyGate({str(out)!r})")
    if json is not None:
        write_json(json, figures)


def _kept(console: Console, table: OutcomeTable, hold_out: float, seed: int) -> OutcomeTable:
    if not hold_out:
        return table
    import numpy as np

    from metis_agent.rollouts.outcomes import held_out

    left_out = held_out(table, hold_out, seed)
    what = "decision points" if table.runs else "questions"
    console.print(f"{int(left_out.sum()):,} of {len(table):,} {what} are held out of training.")
    return table.take(np.flatnonzero(~left_out))


def show_figures(console: Console, figures: dict[str, object], where: str = "") -> None:
    """The figures of `evaluate_gate`, as a table; `where` says on which data, if not on fresh."""
    from rich.table import Table

    counted = "decisions" if "turns" in figures else "questions"
    shown = Table(title=f"{figures['questions']} {counted}{where}", title_justify="left")
    for heading in ("", "area under accuracy and calls", "accuracy at half of the calls", "accuracy"):
        shown.add_column(heading, justify="left" if not heading else "right")
    at = figures["at_threshold"]
    baselines = figures["baselines"]
    if not isinstance(at, dict) or not isinstance(baselines, dict):
        return
    shown.add_row("gate", _cell(figures, "aucc"), _cell(figures, "accuracy_at_half"), _cell(at, "accuracy"))
    for name, row in baselines.items():
        shown.add_row(name, _cell(row, "aucc"), _cell(row, "accuracy_at_half"), _cell(row, "accuracy"))
    console.print(shown)
    console.print(
        f"At the threshold {at['threshold']:.3f}: a tool on {at['tool_rate']:.1%} of the {counted}; "
        f"redundant {at['redundant']:.1%} (harmful {at['harmful']:.1%}), necessary {at['necessary']:.1%}, "
        f"missed {at['missed']:.1%}.\nThe area is the mean accuracy over all budgets of calls. In detail: AUC of "
        f"'the direct answer is right' {_cell(figures, 'auc')}, calibration error {figures['ece']:.3f}."
    )
    if isinstance(turns := figures.get("turns"), dict):
        _show_turns(console, turns)


def _show_turns(console: Console, turns: dict[str, Any]) -> None:
    """The figures of `evaluate_stopping`, as a table."""
    from rich.table import Table

    shown = Table(title=f"By turn, {turns['turns']:,} runs replayed", title_justify="left")
    for heading in ("", "accuracy", "cost", "redundant", "in vain", "necessary"):
        shown.add_column(heading, justify="left" if not heading else "right")
    rules = {"gate": turns, "as they were": turns["as_recorded"], "oracle": turns["oracle"]}
    rules |= {f"at most {cap['calls']} calls": cap for cap in turns["caps"]}
    for name, rule in rules.items():
        cells = [_cell(rule, key) for key in ("accuracy", "cost", "redundant", "in_vain", "necessary")]
        shown.add_row(name, *cells)
    console.print(shown)


def _cell(row: dict[str, object], name: str) -> str:
    value, interval = row.get(name), row.get(f"{name}_interval")
    if not isinstance(value, float):
        return ""
    return f"{value:.3f}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if isinstance(interval, list) else "")


@train_app.command("sft")
@takes_settings
def train_sft_command(
    data: Annotated[str, typer.Option("--data", help="Trajectories, such as OUT/kept of `metis curate sft`.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of the model to start from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the trained model and its checkpoints.")],
    training: SftSettings,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            "--tools",
            help="MODULE:ATTRIBUTE: the agent's tools, for the prompts of runs without token ids; repeat for more.",
        ),
    ] = None,
    tokens: Annotated[
        Literal["auto", "recorded", "template"],
        typer.Option(help="Token ids as recorded, text by the model's chat template, or ids where they fit."),
    ] = "auto",
    fresh: FreshOption = False,
    json: JsonOption = None,
) -> None:
    """Fine-tune a model on curated trajectories; only what the model itself wrote carries loss.

    Example: metis train sft --data runs/sft/kept --model ./Qwen3-VL-8B-Instruct --out runs/cold-start

    A run that was stopped goes on from its last checkpoint with the same command.
    """
    console = screen(json)
    settings = {"data": data, "model": str(model), "tools": tools or [], "tokens": tokens, **asdict(training)}
    quiet_libraries()
    with training_libraries():
        from metis_agent.hdpo.cold_start import train_sft, write_sft_data
        from metis_agent.models.checkpoint import load_checkpoint
    from metis_agent.recording.store import TrajectoryStore

    loaded = load_checkpoint(model)
    store = TrajectoryStore(data, read_only=True)
    prepare_folder(
        out, settings, console, parts=("checkpoints", "sft.json"), option="--out",
        fresh=fresh or (out / "sft.json").exists(),
    )  # fmt: skip
    offered = open_tools(tools, python=False, corpus=None, sessions=1)[0] if tools else []
    rows = write_sft_data(
        store.read(), loaded.tokenizer, out / "data.arrow", max_length=training.max_length, tools=offered, source=tokens
    )
    console.print(
        f"{rows.trajectories} trajectories, {rows.rows} rows, {rows.tokens} tokens, of which {rows.learnt} carry loss."
    )
    for reason, count in rows.excluded.items():
        console.print(f"[yellow]Left out:[/] {count} {reason}.")
    with progress_bars(console) as bars:
        log = train_sft(loaded.model, loaded.tokenizer, rows, out, training, callbacks=[step_bar(bars, "fine-tune")])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    console.print(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} updates. Model: {out}")
    figures = {"rows": rows.rows, "tokens": rows.tokens, "learnt": rows.learnt, "excluded": dict(rows.excluded)}
    write_json(out / "sft.json", {**settings, **figures, "losses": losses})
    if json is not None:
        write_json(json, {**settings, **figures, "losses": losses})


train_app.command("policy")(train_policy_command)
