"""`metis demo`: the whole loop in one sitting, with what it did shown as it does it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.types import Trajectory

if TYPE_CHECKING:
    from metis_agent.hdpo.measure import Measurement
    from metis_agent.worlds.almanac.experiment import Experiment
    from metis_agent.worlds.almanac.noise import Noise

__all__ = ["run_demo"]

WRONG, FAILING = 0.10, 0.02
"""Shares of tool calls that come back wrong, or fail: what a needless call risks in this world."""

_SHOWN = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")


def run_demo(console: Console, folder: Path, *, seed: int, steps: int, questions: int, fresh: bool) -> None:
    """Measure the cold start, train it, measure again; write `metrics.json` and `curve.png` to `folder`.

    Raises:
        MissingDependencyError: the `train` extra is not installed.
        ConfigurationError: the folder holds a stopped run with other settings.
    """
    COLD_START, Experiment, Noise = _imported()
    started = time.perf_counter()
    experiment = Experiment(
        folder=folder, seed=seed, steps=steps, test_questions=questions, noise=Noise(wrong=WRONG, error=FAILING)
    )
    _prepare(console, folder, {"seed": seed, "steps": steps, "questions": questions}, fresh=fresh)
    console.print(
        "A language model of 0.7M parameters answers sums, facts and greetings. It knows many answers, "
        f"and calls a tool all the same. One tool call in {1 / (WRONG + FAILING):.0f} goes wrong.\n"
    )
    with _progress(console) as progress:
        before = _measure(experiment, COLD_START, "cold_start", progress)
        history = _train(experiment, progress)
        after = _measure(experiment, experiment.policy, "hdpo", progress)
    _show_examples(console, before, after)
    _show_metrics(console, before, after)
    metrics = {
        "cold_start": before.to_dict(),
        "hdpo": after.to_dict(),
        "history": history,
        "seed": seed,
        "steps": steps,
        "temperature": experiment.temperature,
        "tool_noise": {"wrong": WRONG, "failing": FAILING},
        "seconds": time.perf_counter() - started,
    }
    _write_curve(folder / "curve.png", history)
    _write_json(folder / "metrics.json", metrics)
    console.print(f"\nFigures: {folder / 'metrics.json'}   curve: {folder / 'curve.png'}   policy: {experiment.policy}")


def _imported() -> tuple[Path, type[Experiment], type[Noise]]:
    """The training stack, quiet and on one thread: these settings are read when it is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are fastest on one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    try:
        from transformers.utils import logging as transformers_logging

        from metis_agent.worlds.almanac.experiment import COLD_START, Experiment
        from metis_agent.worlds.almanac.noise import Noise
    except ImportError as missing:
        raise MissingDependencyError(
            f"the demo trains a model and needs {missing.name!r}; install it with: pip install 'metis-agent[train]'"
        ) from missing
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # TRL warns of each rollout without a reward; those are counted in the metrics as excluded.
    logging.getLogger("trl").setLevel(logging.ERROR)
    return COLD_START, Experiment, Noise


# --- the run ----------------------------------------------------------------------------------------------------


def _prepare(console: Console, folder: Path, settings: Mapping[str, int], *, fresh: bool) -> None:
    """Make the folder ready: empty for a new run, as it was for one that was stopped."""
    note = folder / "run.json"
    finished = (folder / "metrics.json").exists()
    if note.exists() and not (fresh or finished):
        earlier = json.loads(note.read_text())
        if earlier != settings:
            raise ConfigurationError(
                f"{str(folder)!r} holds a stopped run with {earlier!r}, and this one has {dict(settings)!r}; "
                "use the same settings to go on with it, --fresh to start again, or another --folder"
            )
        console.print("Going on with the run that was stopped.")
        return
    for part in ("trajectories", "checkpoints", "policy"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("metrics.json", "curve.png"):
        (folder / part).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(note, dict(settings))


def _measure(experiment: Experiment, policy: Path, name: str, progress: Progress) -> Measurement:
    runs = experiment.test_questions * (1 + len(experiment.probes.branches))
    task = progress.add_task(f"measure {name.replace('_', ' ')}", total=runs)
    return experiment.measure(policy, name, progress=lambda _: progress.advance(task))


def _train(experiment: Experiment, progress: Progress) -> list[Mapping[str, float]]:
    task = progress.add_task("train by HDPO", total=experiment.steps)

    def on_step(metrics: Mapping[str, float]) -> None:
        progress.update(
            task,
            completed=metrics["step"],
            description=f"train by HDPO: {metrics['hdpo/tool_rate']:.0%} call a tool",
        )

    return experiment.train(on_step=on_step)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield progress


# --- what is shown -------------------------------------------------------------------------------------------------


def _show_examples(console: Console, before: Measurement, after: Measurement) -> None:
    """One question of each kind, as each policy handled it."""
    table = Table(title="The same questions, before and after", title_justify="left")
    for heading in ("question", "cold start", "after HDPO"):
        table.add_column(heading)
    later = {run.question.id: run for run in after.trajectories}
    shown: set[str] = set()
    for run in before.trajectories:
        if run.question.kind not in shown:
            shown.add(run.question.kind)
            table.add_row(run.question.text, _told(run), _told(later[run.question.id]))
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
        row = [getattr(measurement.evaluation.overall, name) for measurement in (before, after)]
        cells = [f"{it.value:.3f}  [{it.low:.3f}, {it.high:.3f}]" if it.value is not None else "-" for it in row]
        table.add_row(name.replace("_", " "), *cells)
    table.add_row(
        "seconds per question",
        *(f"{measurement.seconds_per_question:.4f}" for measurement in (before, after)),
    )
    console.print(table)


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all: a metrics file is what says that a run is finished."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=2, default=float) + "\n")
    draft.replace(path)
