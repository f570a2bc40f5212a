"""`metis demo`: the whole loop in one sitting, with what it did shown as it does it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from metis_agent.cli.demo_worlds import DEMO_WORLDS, DemoWorld, WorldName, prepare_training
from metis_agent.cli.output import progress_bars, write_json
from metis_agent.cli.run_folder import FreshOption, prepare_folder
from metis_agent.types import Trajectory

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Estimate, Measurement
    from metis_agent.worlds.experiment import WorldExperiment

__all__ = ["demo_command", "run_demo"]

_PARTS = ("trajectories", "checkpoints", "policy", "metrics.json", "curve.png", "pictures.html")
"""What a run makes in its folder."""
_SHOWN = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")


def _by_world(default: Callable[[DemoWorld], object]) -> str:
    """A default of the demo as its help shows it."""
    return ", ".join(f"{name} {default(world)}" for name, world in DEMO_WORLDS.items())


def demo_command(
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
    run_demo(Console(), folder, world=world, seed=seed, steps=steps, questions=questions, fresh=fresh)


def run_demo(
    console: Console, folder: Path | None, *, world: WorldName = "almanac", seed: int, steps: int | None,
    questions: int | None, fresh: bool,
) -> None:  # fmt: skip
    """Measure the cold start, train it, measure again; write `metrics.json` and `curve.png` to the folder.

    Folder, steps and questions are by default the world's own.

    Raises:
        MissingDependencyError: the `train` extra is not installed.
        ConfigurationError: the folder holds a stopped run with other settings, or other files.
    """
    prepare_training()
    started = time.perf_counter()
    its = DEMO_WORLDS[world]
    folder, steps, questions = folder or its.folder, steps or its.steps, questions or its.questions
    settings: dict[str, int | str] = {"seed": seed, "steps": steps, "questions": questions}
    prepare_folder(
        folder, settings if world == "almanac" else {**settings, "world": world}, console, parts=_PARTS,
        option="--folder", fresh=fresh or (folder / "metrics.json").exists(),
    )  # fmt: skip
    console.print(f"{its.introduction}\n")
    experiment = its.experiment(folder, seed, steps, questions)
    try:
        with progress_bars(console, width=34) as progress:
            before = _measure(experiment, experiment.cold_start, "cold_start", progress)
            history = _train(experiment, progress)
            after = _measure(experiment, experiment.policy, "hdpo", progress)
    finally:
        experiment.close()
    _show_examples(console, its, before, after)
    _show_metrics(console, before, after)
    metrics = {
        "cold_start": before.to_dict(),
        "hdpo": after.to_dict(),
        "history": history,
        "seed": seed,
        "steps": steps,
        "temperature": experiment.temperature,
        "tool_noise": dict(its.tool_noise),
        "seconds": time.perf_counter() - started,
    }
    _write_curve(folder / "curve.png", history)
    further = its.keep(folder, before, after)
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    places = [f"Figures: {folder / 'metrics.json'}", f"curve: {folder / 'curve.png'}", further]
    console.print("\n" + "   ".join([*filter(None, places), f"policy: {experiment.policy}"]))


# --- the run ----------------------------------------------------------------------------------------------------


def _measure(experiment: WorldExperiment, policy: Path, name: str, progress: Progress) -> Measurement:
    runs = experiment.test_questions * (1 + len(experiment.probes.branches))
    task = progress.add_task(f"measure {name.replace('_', ' ')}", total=runs)
    return experiment.measure(policy, name, progress=lambda _: progress.advance(task))


def _train(experiment: WorldExperiment, progress: Progress) -> list[Mapping[str, float]]:
    task = progress.add_task("train by HDPO", total=experiment.steps)

    def on_step(metrics: Mapping[str, float]) -> None:
        progress.update(
            task,
            completed=metrics["step"],
            description=f"train by HDPO: {metrics['hdpo/tool_rate']:.0%} call a tool",
        )

    return experiment.train(on_step=on_step)


# --- what is shown -------------------------------------------------------------------------------------------------


def _show_examples(console: Console, world: DemoWorld, before: Measurement, after: Measurement) -> None:
    """One question of each kind, as each policy handled it."""
    table = Table(title="The same questions, before and after", title_justify="left")
    for heading in ("question", "cold start", "after HDPO"):
        table.add_column(heading)
    later = {run.question.id: run for run in after.trajectories}
    shown: set[str] = set()
    for run in before.trajectories:
        if run.question.kind not in shown:
            shown.add(run.question.kind)
            table.add_row(world.asked(run.question), _told(run), _told(later[run.question.id]))
    console.print(table)


def _told(run: Trajectory) -> str:
    calls = [f"{outcome.tool}({', '.join(map(str, outcome.arguments.values()))})" for outcome in run.outcomes]
    return " → ".join([*calls, run.answer])


def _show_metrics(console: Console, before: Measurement, after: Measurement) -> None:
    table = Table(title=f"{before.evaluation.questions} held-out questions, 95% intervals", title_justify="left")
    table.add_column("")
    table.add_column("cold start", justify="right")
    table.add_column("after HDPO", justify="right")
    for name in _SHOWN:
        row = (getattr(measurement.evaluation.overall, name) for measurement in (before, after))
        table.add_row(name.replace("_", " "), *map(_interval, row))
    if before.classes:
        _add_classes(table, before, after)
    table.add_row(
        "seconds per question",
        *(f"{measurement.seconds_per_question:.4f}" for measurement in (before, after)),
    )
    console.print(table)


def _add_classes(table: Table, before: Measurement, after: Measurement) -> None:
    """Rows for each class of questions, and for each kind when its branch is forced."""
    for name in before.classes:
        pair = [measurement.classes.get(name) for measurement in (before, after)]
        for metric in ("accuracy", "tool_rate"):
            estimates = [getattr(metrics, metric) if metrics else None for metrics in pair]
            table.add_row(f"{metric.replace('_', ' ')}, {name}", *map(_interval, estimates))
    for branch, probes in before.forced.items():
        later = after.forced.get(branch)
        for kind in probes.kinds:
            both = (probes.kinds[kind], later.kinds.get(kind) if later else None)
            cells = [_interval(metrics.accuracy) if metrics else "-" for metrics in both]
            table.add_row(f"accuracy, forced {branch}: {kind}", *cells)


def _interval(it: Estimate | None) -> str:
    return "-" if it is None or it.value is None else f"{it.value:.3f}  [{it.low:.3f}, {it.high:.3f}]"


def _write_curve(path: Path, history: list[Mapping[str, float]]) -> None:
    """The training curve: accuracy, tool rate, redundant, necessary and rho by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [entry["step"] for entry in history]
    for name in ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "rho"):
        axes.plot(steps, [_number(entry.get(f"hdpo/{name}")) for entry in history], label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="share of free rollouts (rho: of all)", ylim=(-0.02, 1.02))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _number(value: float | None) -> float:
    """NaN, which a plot leaves out, where a step could not tell."""
    return math.nan if value is None else value
