"""The worlds that `metis demo` can show: what each says of itself, how its runs are set up, what it leaves behind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from metis_agent.cli.output import quiet_libraries, training_libraries
from metis_agent.types import Question

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Measurement
    from metis_agent.worlds.experiment import WorldExperiment

__all__ = ["DEMO_WORLDS", "DemoWorld", "WorldName", "prepare_training"]

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
    from metis_agent.worlds.almanac.experiment import Experiment
    from metis_agent.worlds.almanac.tools import Noise

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
