"""The `metis` command. Each command is a file; heavy imports happen when one is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from metis_agent.cli.ask import ask_command
from metis_agent.cli.calibrate import calibrate_command
from metis_agent.cli.curate import curate_app
from metis_agent.cli.doctor import doctor as doctor_command
from metis_agent.cli.drift import drift_command
from metis_agent.cli.evaluate import evaluate_app
from metis_agent.cli.report import report_command
from metis_agent.cli.rollout import rollout_command
from metis_agent.cli.train import train_app
from metis_agent.cli.train_policy import train_policy_command
from metis_agent.cli.train_sft import train_sft_command
from metis_agent.errors import MetisError

__all__ = ["app", "main"]

_INTERRUPTED = 130

app = typer.Typer(
    name="metis",
    help="Metis knows when not to call a tool.\n\nBegin with `metis demo`: it trains a tiny agent here, offline, "
    "and shows what it was like before and after; `metis ask` lets you try it. Then your own agent: `metis rollout` "
    "records what each branch of your questions brings, `metis train gate` learns from it, `metis calibrate` sets the "
    "threshold for a promise, `metis evaluate` and `metis report` show what was saved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the run is written: records, checkpoints, figures.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps, of 16 questions times 16 rollouts.")] = 60,
    questions: Annotated[int, typer.Option(min=5, help="Held-out questions to measure on.")] = 500,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of going on with a stopped run.")] = False,
) -> None:
    """Train the tiny agent by HDPO on its own trajectories, and show before and after.

    Offline, on the CPU, in a few minutes. A run that was stopped, by Ctrl-C or worse, goes on where it was.
    """
    from metis_agent.cli.demo import run_demo

    run_demo(Console(), folder, seed=seed, steps=steps, questions=questions, fresh=fresh)


app.command("ask")(ask_command)
app.command("rollout")(rollout_command)
app.add_typer(curate_app, name="curate")
train_app.command("sft")(train_sft_command)
train_app.command("policy")(train_policy_command)
app.add_typer(train_app, name="train")
app.command("calibrate")(calibrate_command)
app.add_typer(evaluate_app, name="evaluate")
app.command("drift")(drift_command)
app.command("report")(report_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line; a known error is one line and exit code 1, Ctrl-C is 130."""
    console = Console(stderr=True)
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            console.print("\nStopped. Run the same command again to go on from here.")
        raise
    except MetisError as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        sys.exit(1)
