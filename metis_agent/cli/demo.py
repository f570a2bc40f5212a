"""`metis demo`: the whole loop in one sitting, in one of two worlds, with what it did shown as it does it.

With `--model` it is a pretrained model's own loop, on questions and tools of the user's own (`cli.demo_model`).

A world says what it is about, how its runs are set up, and what it leaves behind; of the gallery there is a page
besides: the picture, what the model sees of it, the call, the crop, the answer.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from metis_agent.cli.output import (
    FreshOption,
    is_finished,
    prepare_folder,
    progress_bars,
    quiet_libraries,
    screen,
    training_libraries,
    write_json,
)
from metis_agent.types import Question, Trajectory

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Estimate, Measurement
    from metis_agent.worlds.experiment import WorldExperiment

__all__ = [
    "DEMO_WORLDS",
    "DemoWorld",
    "WorldName",
    "demo_command",
    "prepare_training",
    "run_demo",
    "show_examples",
    "show_metrics",
    "write_curve",
]

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
    from metis_agent.worlds.gallery.pictures import write_sheet

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
_PRETRAINED = "A pretrained model"
_SHOWN = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")


def _by_world(default: Callable[[DemoWorld], object]) -> str:
    """A default of the demo as its help shows it."""
    return ", ".join(f"{name} {default(world)}" for name, world in DEMO_WORLDS.items())


def demo_command(
    world: Annotated[
        Literal["almanac", "gallery"] | None,
        typer.Option(help="Questions in words, or about pictures.", show_default="almanac"),
    ] = None,
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
        str | None,
        typer.Option(
            metavar="INTEGER|FILE",
            help="Held-out questions to measure on; with --model, a file of questions with answers.",
            show_default=_by_world(lambda world: world.questions),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Train this chat model instead: a folder, a GGUF file, or a name on the Hub. SFT on its own curated "
            "runs, then HDPO.",
            rich_help_panel=_PRETRAINED,
        ),
    ] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(help="MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE, its tools; repeat.", rich_help_panel=_PRETRAINED),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="A file, or 'chatml' for the packaged one, where the model's own has no place for tools.",
            rich_help_panel=_PRETRAINED,
        ),
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(help="For the model; one that shows a call helps a small one.", rich_help_panel=_PRETRAINED),
    ] = None,
    hold_out: Annotated[
        float | None,
        typer.Option(help="Share of the questions to measure on.", show_default="0.4", rich_help_panel=_PRETRAINED),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs down each branch to choose the cold start's from.",
            show_default="4",
            rich_help_panel=_PRETRAINED,
        ),
    ] = None,
    ends_only: Annotated[
        bool,
        typer.Option(
            "--ends-only", help="Measure before and after, and not between SFT and HDPO.", rich_help_panel=_PRETRAINED
        ),
    ] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="KEY=VALUE: a key of `metis train policy --config pretrained --show`, or sft.KEY of "
            "`metis train sft`; repeat.",
            rich_help_panel=_PRETRAINED,
        ),
    ] = None,
    fresh: FreshOption = False,
) -> None:
    """Train the tiny agent by HDPO on its own trajectories, and show before and after.

    Offline, on the CPU, in a few minutes. A run that was stopped, by Ctrl-C or worse, goes on where it was.

    Example: metis demo

    Example: metis demo --model ./Qwen2.5-0.5B-Instruct --questions questions.jsonl --tools my_tools.py:TOOLS
    """
    console = screen(None)
    if model is not None:
        if world is not None:
            raise typer.BadParameter("--world and --model: which of the two is to be trained?")
        from metis_agent.cli.demo_model import Pretrained, run_pretrained

        own = Pretrained(
            model=model, questions=questions, tools=tuple(tools or ()), chat_template=chat_template,
            system_prompt=system_prompt, ends_only=ends_only,
            hold_out=Pretrained.hold_out if hold_out is None else hold_out, samples=samples or Pretrained.samples,
            changes=tuple(changes or ()), folder=folder or Pretrained.folder, seed=seed, steps=steps,
        )  # fmt: skip
        run_pretrained(console, own, fresh=fresh)
        return
    count = None if questions is None else _count(questions)
    if tools or chat_template or system_prompt or changes or samples or ends_only or hold_out is not None:
        raise typer.BadParameter(
            "--tools, --chat-template, --system-prompt, --hold-out, --samples, --ends-only and --set go with --model."
        )
    run_demo(console, folder, world=world or "almanac", seed=seed, steps=steps, questions=count, fresh=fresh)


def _count(questions: str) -> int:
    if not questions.isdecimal() or int(questions) < 5:
        raise typer.BadParameter(
            f"{questions!r}: at least 5 held-out questions; a file of questions goes with --model.",
            param_hint="--questions",
        )
    return int(questions)


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
    settings: dict[str, int | str] = {"seed": seed, "steps": steps, "questions": questions}
    settings |= {} if world == "almanac" else {"world": world}
    if not fresh and is_finished(folder, settings, console, option="--folder"):
        _say_what_next(console, folder, world)
        return
    prepare_training()
    started = time.perf_counter()
    prepare_folder(folder, settings, console, parts=_PARTS, option="--folder", fresh=fresh)
    console.print(f"{its.introduction}\n")
    experiment = its.experiment(folder, seed, steps, questions)
    try:
        with progress_bars(console, width=34) as progress:
            before = _measure(experiment, experiment.cold_start, "cold_start", progress)
            history = _train(experiment, progress)
            after = _measure(experiment, experiment.policy, "hdpo", progress)
    finally:
        experiment.close()
    runs = {"cold start": before, "after HDPO": after}
    show_examples(console, runs, its.asked)
    show_metrics(console, runs)
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
    write_curve(folder / "curve.png", history)
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


def show_examples(console: Console, runs: Mapping[str, Measurement], asked: Callable[[Question], str]) -> None:
    """One question of each kind, as the model handled it at each time."""
    table = Table(title="The same questions, before and after", title_justify="left")
    for heading in ("question", *runs):
        table.add_column(heading)
    first, *later = ({run.question.id: run for run in it.trajectories} for it in runs.values())
    shown: set[str] = set()
    for run in first.values():
        if run.question.kind not in shown:
            shown.add(run.question.kind)
            told = [asked(run.question), _told(run), *(_told(found[run.question.id]) for found in later)]
            table.add_row(*map(escape, told))
    console.print(table)


def _told(run: Trajectory) -> str:
    calls = [f"{outcome.tool}({', '.join(map(str, outcome.arguments.values()))})" for outcome in run.outcomes]
    return " → ".join([*calls, run.answer])


def show_metrics(console: Console, runs: Mapping[str, Measurement]) -> None:
    """The figures at each time."""
    first, *_ = measurements = list(runs.values())
    table = Table(title=f"{first.evaluation.questions} held-out questions, 95% intervals", title_justify="left")
    table.add_column("")
    for heading in runs:
        table.add_column(heading, justify="right")
    for name in _SHOWN:
        row = (getattr(measurement.evaluation.overall, name) for measurement in measurements)
        table.add_row(name.replace("_", " "), *map(_interval, row))
    if first.classes:
        _add_classes(table, measurements)
    table.add_row(
        "seconds per question",
        *(f"{measurement.seconds_per_question:.4f}" for measurement in measurements),
    )
    console.print(table)


def _add_classes(table: Table, measurements: Sequence[Measurement]) -> None:
    """Rows for each class of questions, and for each kind when its branch is forced."""
    first = measurements[0]
    for name in first.classes:
        metrics = [it.classes.get(name) for it in measurements]
        for metric in ("accuracy", "tool_rate"):
            estimates = [getattr(each, metric) if each else None for each in metrics]
            table.add_row(f"{metric.replace('_', ' ')}, {name}", *map(_interval, estimates))
    for branch, probes in first.forced.items():
        for kind in probes.kinds:
            found = [it.forced[branch].kinds.get(kind) if branch in it.forced else None for it in measurements]
            cells = [_interval(each.accuracy) if each else "-" for each in found]
            table.add_row(escape(f"accuracy, forced {branch}: {kind}"), *cells)


def _interval(it: Estimate | None) -> str:
    return "-" if it is None or it.value is None else f"{it.value:.3f}  [{it.low:.3f}, {it.high:.3f}]"


def write_curve(path: Path, history: list[Mapping[str, float]]) -> None:
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
