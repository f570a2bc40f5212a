"""`metis train sft`: the cold start, from curated trajectories."""

from __future__ import annotations

import json as json_module
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from metis_agent.cli.curate_parts import open_tools
from metis_agent.cli.outcome_options import JsonOption, SeedOption, progress_bars, screen, write_json
from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.recording import formats

__all__ = ["train_sft_command"]


def train_sft_command(
    data: Annotated[str, typer.Option("--data", help="Trajectories, such as OUT/kept of `metis curate sft`.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of the model to start from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the trained model and its checkpoints.")],
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
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the data.")] = 2.0,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with warm-up and a linear decay.")] = 1e-5,
    batch: Annotated[int, typer.Option(min=1, help="Rows a device and step.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Such steps in one update.")] = 1,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens; what is longer is left out and counted.")] = 8_192,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 trains all weights.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Updates; what a killed run loses at most.")] = 200,
    seed: SeedOption = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of going on with a stopped run.")] = False,
    json: JsonOption = None,
) -> None:
    """Fine-tune a model on curated trajectories; only what the model itself wrote carries loss.

    Example: metis train sft --data runs/sft/kept --model ./Qwen3-VL-8B-Instruct --out runs/cold-start

    A run that was stopped goes on from its last checkpoint with the same command.
    """
    console = screen(json)
    settings = {
        "data": data, "model": str(model), "tools": tools or [], "tokens": tokens, "epochs": epochs, "seed": seed,
        "learning_rate": learning_rate, "batch": batch, "accumulation": accumulation, "max_length": max_length,
        "lora": lora,
    }  # fmt: skip
    _quiet()
    try:
        from metis_agent.hdpo.cold_start import SftSettings, train_sft, write_sft_data
        from metis_agent.models.checkpoint import load_checkpoint
    except ImportError as missing:
        raise MissingDependencyError(
            f"training needs {missing.name!r}; install it with: pip install 'metis-agent[train]'"
        ) from missing
    from metis_agent.recording.store import TrajectoryStore

    loaded = load_checkpoint(model)
    store = TrajectoryStore(data, read_only=True)
    _prepare(out, settings, fresh=fresh, console=console)
    offered = open_tools(tools, python=False, corpus=None, sessions=1)[0] if tools else []
    rows = write_sft_data(
        store.read(), loaded.tokenizer, out / "data.arrow", max_length=max_length, tools=offered, source=tokens
    )
    console.print(
        f"{rows.trajectories} trajectories, {rows.rows} rows, {rows.tokens} tokens, of which {rows.learnt} carry loss."
    )
    for reason, count in rows.excluded.items():
        console.print(f"[yellow]Left out:[/] {count} {reason}.")
    how = SftSettings(
        epochs=epochs, learning_rate=learning_rate, batch=batch, accumulation=accumulation, max_length=max_length,
        seed=seed, lora_rank=lora, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    with progress_bars(console) as bars:
        log = train_sft(loaded.model, loaded.tokenizer, rows, out, how, callbacks=[_bar(bars)])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    console.print(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} updates. Model: {out}")
    figures = {"rows": rows.rows, "tokens": rows.tokens, "learnt": rows.learnt, "excluded": dict(rows.excluded)}
    write_json(out / "sft.json", {**settings, **figures, "losses": losses})
    if json is not None:
        write_json(json, {**settings, **figures, "losses": losses})


def _quiet() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _bar(bars: Any) -> Any:
    """A callback that moves a bar."""
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.task = bars.add_task("fine-tune", total=state.max_steps, completed=state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bars.update(self.task, completed=state.global_step)

    return Bar()


def _prepare(out: Path, settings: Mapping[str, Any], *, fresh: bool, console: Console) -> None:
    """Make the folder ready: empty for a new run, as it was for one that was stopped."""
    note = out / "run.json"
    if note.exists() and not fresh and not (out / "sft.json").exists():
        earlier = json_module.loads(note.read_text())
        formats.check_format(earlier, formats.RUN, repr(str(note)))
        if (earlier := formats.without_format(earlier)) != settings:
            raise ConfigurationError(
                f"{str(out)!r} holds a stopped run with {earlier!r}, and this one has {dict(settings)!r}; use the same "
                "settings to go on with it, --fresh to start again, or another --out."
            )
        console.print("Going on with the run that was stopped.")
        return
    if out.exists() and any(out.iterdir()) and not note.exists():
        raise ConfigurationError(f"{str(out)!r} holds other files; name another --out.")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "sft.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(json_module.dumps(formats.with_format(settings, formats.RUN), indent=2) + "\n")
