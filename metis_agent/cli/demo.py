"""`metis demo`: the whole loop in one sitting, in one of two worlds, with what it did shown as it does it.

A world says what it is about, how its runs are set up, and what it leaves behind; of the gallery there is a page
besides: the picture, what the model sees of it, the call, the crop, the answer.
"""

from __future__ import annotations

import base64
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from metis_agent.cli.output import (
    FreshOption,
    prepare_folder,
    progress_bars,
    quiet_libraries,
    screen,
    training_libraries,
    write_json,
)
from metis_agent.messages import image_source
from metis_agent.tools.images import load_image
from metis_agent.types import Question, Trajectory

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Estimate, Measurement
    from metis_agent.worlds.experiment import WorldExperiment

__all__ = ["DEMO_WORLDS", "DemoWorld", "WorldName", "demo_command", "prepare_training", "run_demo", "write_sheet"]

WorldName = Literal["almanac", "gallery"]

_WRONG, _FAILING = 0.10, 0.02
"""Shares of tool calls that come back wrong, or fail: what a needless call risks in the almanac."""


@dataclass(frozen=True, kw_only=True)
class DemoWorld:
    """A world, as the demo needs it."""

    folder: Path
    """Where a run is written, by default."""
    steps: int
    questions: int
    introduction: str
    tool_noise: Mapping[str, float]
    experiment: Callable[[Path, int, int, int], WorldExperiment]
    """Makes a run of folder, seed, steps and held-out questions; heavy imports happen here."""
    asked: Callable[[Question], str] = lambda question: question.text
    """A question in one line."""
    keep: Callable[[Path, Measurement, Measurement], str] = lambda folder, before, after: ""
    """Writes what the world shows beside the figures to the folder, and says where."""


def prepare_training() -> None:
    """Set the training stack up, quiet and on one thread: these settings are read when it is imported.

    Raises:
        MissingDependencyError: the `train` extra is not installed.
    """
    quiet_libraries()
    warnings.simplefilter("ignore", FutureWarning)
    with training_libraries():
        from transformers.utils import logging as transformers_logging

        import metis_agent.worlds.experiment  # noqa: F401
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # TRL warns of each rollout without a reward; those are counted in the metrics as excluded.
    logging.getLogger("trl").setLevel(logging.ERROR)


def _almanac(folder: Path, seed: int, steps: int, questions: int) -> WorldExperiment:
    from metis_agent.worlds.almanac.agent import Noise
    from metis_agent.worlds.almanac.experiment import Experiment

    noise = Noise(wrong=_WRONG, error=_FAILING)
    return Experiment(folder=folder, seed=seed, steps=steps, test_questions=questions, noise=noise)


def _gallery(folder: Path, seed: int, steps: int, questions: int) -> WorldExperiment:
    from metis_agent.worlds.gallery.experiment import Experiment

    return Experiment(folder=folder, seed=seed, steps=steps, test_questions=questions)


def _keep_pictures(folder: Path, before: Measurement, after: Measurement) -> str:
    from metis_agent.cli.demo import write_sheet

    return f"pictures: {write_sheet(folder / 'pictures.html', before, after)}"


DEMO_WORLDS: Mapping[WorldName, DemoWorld] = {
    "almanac": DemoWorld(
        folder=Path("runs/demo"),
        steps=60,
        questions=500,
        introduction="A language model of 0.7M parameters answers sums, facts and greetings. It knows many answers, "
        f"and calls a tool all the same. One tool call in {1 / (_WRONG + _FAILING):.0f} goes wrong.",
        tool_noise={"wrong": _WRONG, "failing": _FAILING},
        experiment=_almanac,
    ),
    "gallery": DemoWorld(
        folder=Path("runs/demo-vision"),
        steps=150,
        questions=210,
        introduction="A Qwen3-VL of 0.6M parameters looks at signs, labels, charts and paintings. It reads large "
        "text at a glance, and crops and enlarges it all the same; tiny text it can read only so.",
        tool_noise={"wrong": 0.0, "failing": 0.0},
        experiment=_gallery,
        asked=lambda question: f"{question.text} ({question.kind})",
        keep=_keep_pictures,
    ),
}


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
    run_demo(screen(None), folder, world=world, seed=seed, steps=steps, questions=questions, fresh=fresh)


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
    its = DEMO_WORLDS[world]
    folder, steps, questions = folder or its.folder, steps or its.steps, questions or its.questions
    if (folder / "metrics.json").exists() and not fresh:
        console.print(f"The run in {folder} is finished, and stays as it is; --fresh makes it again.")
        _say_what_next(console, folder, world)
        return
    prepare_training()
    started = time.perf_counter()
    settings: dict[str, int | str] = {"seed": seed, "steps": steps, "questions": questions}
    prepare_folder(
        folder, settings if world == "almanac" else {**settings, "world": world}, console, parts=_PARTS,
        option="--folder", fresh=fresh,
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
    _say_what_next(console, folder, world)


def _say_what_next(console: Console, folder: Path, world: WorldName) -> None:
    stores = f"--store {folder}/trajectories/hdpo --before {folder}/trajectories/cold_start"
    steps = [f"metis report {stores} --history {folder}/metrics.json --out report.html"]
    if world == "almanac":
        steps.insert(0, 'metis ask "What is 21 + 34?"')
    steps.append("metis rollout --help   (your own agent)")
    console.print("Next: " + "\n      ".join(steps), soft_wrap=True, highlight=False)


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


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222; }
section { display: grid; grid-template-columns: 16rem 1fr 1fr; gap: 1.5rem; padding: 1.5rem 0; }
section + section { border-top: 1px solid #ccc; }
h2, h3 { font-size: 1rem; margin: 0 0 .5rem; }
img { display: block; width: 128px; height: 128px; } figure { margin: 0 .5rem .5rem 0; display: inline-block; }
figcaption, code { font-size: .8rem; } .seen img { image-rendering: pixelated; }
code { display: block; overflow-wrap: anywhere; margin-bottom: .5rem; }
.right { color: #17622f; } .wrong { color: #9c1c1c; }
"""


def write_sheet(path: Path, before: Measurement, after: Measurement, *, of_each: int = 2) -> Path:
    """Write a page that needs nothing beside itself, with the first questions of each kind.

    Args:
        path: Of the page.
        before: The cold start.
        after: The trained policy, on the same questions.
        of_each: Questions of each kind.
    """
    later = {run.question.id: run for run in after.trajectories}
    shown: dict[str, list[str]] = {}
    for run in before.trajectories:
        parts = shown.setdefault(run.question.kind, [])
        if len(parts) < of_each:
            parts.append(_section(run, later[run.question.id]))
    body = "".join(part for parts in shown.values() for part in parts)
    title = "The same pictures, before and after HDPO"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{body}</html>\n",
        encoding="utf-8",
    )
    return path


def _section(before: Trajectory, after: Trajectory) -> str:
    question = before.question
    return (
        f"<section><div><h2>{escape(question.text)}</h2><p>{escape(question.kind)}</p>{_picture(question)}</div>"
        f"{_run('Cold start', before)}{_run('After HDPO', after)}</section>"
    )


def _picture(question: Question) -> str:
    source = question.metadata["images"][0]
    return (
        _figure(source, "the picture") + f'<span class="seen">{_figure(_seen(source), "as the model sees it")}</span>'
    )


def _run(title: str, run: Trajectory) -> str:
    calls = "".join(f"<code>{escape(_call(outcome.tool, outcome.arguments))}</code>" for outcome in run.outcomes)
    crops = "".join(_figure(_seen(source), "what it got to see") for source in _tool_images(run))
    right = run.answer == run.question.answer
    verdict = f'<p class="{"right" if right else "wrong"}">{escape(run.answer)} {"✓" if right else "✗"}</p>'
    return f'<div class="seen"><h3>{title}</h3>{calls or "<p>At a glance:</p>"}{crops}{verdict}</div>'


def _call(tool: str, arguments: Mapping[str, Any]) -> str:
    return f"{tool}({', '.join(map(str, arguments.values()))})"


def _tool_images(run: Trajectory) -> list[str | bytes]:
    contents = [message["data"]["content"] for message in run.messages if message["type"] == "tool"]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [source for block in blocks if isinstance(block, dict) and (source := image_source(block)) is not None]


def _seen(source: str | bytes) -> str:
    """An image at the size at which the model sees it, as a data URI."""
    from metis_agent.worlds.gallery.pictures import VIEW

    file = io.BytesIO()
    load_image(source).convert("RGB").resize((VIEW, VIEW), 3).save(file, "PNG")  # 3: BICUBIC, as the processor does
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{escape(uri)}" alt=""><figcaption>{caption}</figcaption></figure>'
