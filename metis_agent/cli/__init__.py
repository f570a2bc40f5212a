"""The `metis` command. Each command is a file; heavy imports happen when one is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from metis_agent.cli.ask import ask_command
from metis_agent.cli.benchmark import evaluate_benchmark_command
from metis_agent.cli.calibrate import calibrate_command
from metis_agent.cli.curate import curate_app
from metis_agent.cli.demo_worlds import DEMO_WORLDS, DemoWorld
from metis_agent.cli.doctor import doctor as doctor_command
from metis_agent.cli.drift import drift_command
from metis_agent.cli.evaluate import evaluate_app
from metis_agent.cli.import_traces import import_command
from metis_agent.cli.push import push_command
from metis_agent.cli.report import report_command
from metis_agent.cli.rollout import rollout_command
from metis_agent.cli.run_folder import FreshOption
from metis_agent.cli.train import train_app
from metis_agent.cli.train_policy import train_policy_command
from metis_agent.cli.train_sft import train_sft_command
from metis_agent.errors import MetisError

__all__ = ["app", "main"]

_INTERRUPTED = 130
_TRY, _LEARN, _LOOK = "Try it", "Record and learn", "Measure, watch, publish"
_ORDER = (
    "demo",
    "ask",
    "doctor",
    "import",
    "rollout",
    "curate",
    "train",
    "calibrate",
    "evaluate",
    "report",
    "drift",
    "push",
)


class _InOrder(TyperGroup):
    """Lists commands in the order in which they are needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=[*_ORDER, *super().list_commands(ctx)].index)


app = typer.Typer(
    name="metis",
    help="Metis knows when not to call a tool.\n\nBegin with `metis demo`: it trains a tiny agent here, offline, "
    "and shows what it was like before and after; `metis ask` lets you try it. Then your own agent: `metis rollout` "
    "records what each branch of your questions brings, `metis train gate` learns from it, `metis calibrate` sets the "
    "threshold for a promise, `metis evaluate` and `metis report` show what was saved.",
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _by_world(default: Callable[[DemoWorld], object]) -> str:
    """A default of the demo as its help shows it."""
    return ", ".join(f"{name} {default(world)}" for name, world in DEMO_WORLDS.items())


@app.command(rich_help_panel=_TRY)
def demo(
    world: Annotated[
        Literal["almanac", "gallery"], typer.Option(help="Questions in words, or about pictures.")
    ] = "almanac",
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where the run is written: records, checkpoints, figures.",
            show_default=_by_world(lambda world: world.folder),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training steps, of 16 questions (gallery: 14) times 16 rollouts.",
            show_default=_by_world(lambda world: world.steps),
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            min=5, help="Held-out questions to measure on.", show_default=_by_world(lambda world: world.questions)
        ),
    ] = None,
    fresh: FreshOption = False,
) -> None:
    """Train the tiny agent by HDPO on its own trajectories, and show before and after.

    Offline, on the CPU, in a few minutes. A run that was stopped, by Ctrl-C or worse, goes on where it was.
    """
    from metis_agent.cli.demo import run_demo

    run_demo(Console(), folder, world=world, seed=seed, steps=steps, questions=questions, fresh=fresh)


app.command("ask", rich_help_panel=_TRY)(ask_command)
app.command("doctor", rich_help_panel=_TRY)(doctor_command)
app.command("import", rich_help_panel=_LEARN)(import_command)
app.command("rollout", rich_help_panel=_LEARN)(rollout_command)
app.add_typer(curate_app, name="curate", rich_help_panel=_LEARN)
train_app.command("sft")(train_sft_command)
train_app.command("policy")(train_policy_command)
app.add_typer(train_app, name="train", rich_help_panel=_LEARN)
app.command("calibrate", rich_help_panel=_LEARN)(calibrate_command)
evaluate_app.command("benchmark")(evaluate_benchmark_command)
app.add_typer(evaluate_app, name="evaluate", rich_help_panel=_LOOK)
app.command("report", rich_help_panel=_LOOK)(report_command)
app.command("drift", rich_help_panel=_LOOK)(drift_command)
app.command("push", rich_help_panel=_LOOK)(push_command)


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
        # Not wrapped: the remedy is often a command to copy.
        console.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
