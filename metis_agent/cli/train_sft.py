"""`metis train sft`: the cold start, from curated trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from metis_agent.cli.curate_parts import open_tools
from metis_agent.cli.outcome_options import SeedOption
from metis_agent.cli.output import JsonOption, progress_bars, screen, write_json
from metis_agent.cli.run_folder import FreshOption, prepare_folder
from metis_agent.cli.training_stack import quiet_libraries, step_bar, training_libraries

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
    fresh: FreshOption = False,
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
    quiet_libraries()
    with training_libraries():
        from metis_agent.hdpo.cold_start import SftSettings, train_sft, write_sft_data
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
        log = train_sft(loaded.model, loaded.tokenizer, rows, out, how, callbacks=[step_bar(bars, "fine-tune")])
    losses = [entry["loss"] for entry in log if "loss" in entry]
    console.print(f"Loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} updates. Model: {out}")
    figures = {"rows": rows.rows, "tokens": rows.tokens, "learnt": rows.learnt, "excluded": dict(rows.excluded)}
    write_json(out / "sft.json", {**settings, **figures, "losses": losses})
    if json is not None:
        write_json(json, {**settings, **figures, "losses": losses})
