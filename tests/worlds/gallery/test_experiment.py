"""A small real run of the whole loop: the shipped cold start, the graph, the sandbox, the trainer, a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from metis_agent.evaluation.agents import Measurement, Probes
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.recording.store import TrajectoryStore
from metis_agent.worlds.gallery.experiment import Experiment
from metis_agent.worlds.gallery.questions import KINDS, LEGIBLE, PAINTING

QUESTIONS, G = 5, 4


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    it = Experiment(
        folder=tmp_path_factory.mktemp("gallery"), steps=2, questions_per_step=QUESTIONS, test_questions=len(KINDS),
        groups=StratifiedGroups(size=G, direct=1, tool=1), probes=Probes(direct=2, tool=1), seed=3,
    )  # fmt: skip
    yield it
    it.close()


@pytest.fixture(scope="module")
def history(experiment: Experiment) -> list[Any]:
    return list(experiment.train())


@pytest.fixture(scope="module")
def measured(experiment: Experiment, history: list[Any]) -> Measurement:
    return experiment.measure(experiment.policy, "hdpo")


def test_each_step_learns_from_whole_groups(experiment: Experiment, history: list[Any]) -> None:
    assert [entry["step"] for entry in history] == [1, 2]
    assert all(entry["hdpo/excluded"] == 0 for entry in history)
    runs = list(TrajectoryStore(experiment.folder / "trajectories" / "train", read_only=True).read())
    assert len(runs) == 2 * QUESTIONS * G
    assert {run.status for run in runs} == {"finished"}
    tools = {outcome.tool for run in runs for outcome in run.outcomes if outcome.status == "ok"}
    assert tools == {"python", "image_search"}


def test_only_the_language_model_learns(experiment: Experiment, history: list[Any]) -> None:
    before = load_file(experiment.cold_start / "model.safetensors")
    after = load_file(experiment.policy / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if ".visual." in name]
    assert any("embed_tokens" in name for name in changed)


def test_a_measurement_tells_kinds_classes_and_forced_branches(measured: Measurement) -> None:
    figures = measured.to_dict()
    assert set(figures["kinds"]) == set(KINDS)
    assert set(figures["classes"]) == {"legible", "illegible"}
    legible = figures["classes"]["legible"]
    legible_kinds = [kind for kind in KINDS if kind in LEGIBLE]
    by_kind = [figures["kinds"][kind]["tool_rate"] for kind in legible_kinds]
    assert legible["tool_rate"] == pytest.approx(sum(by_kind) / len(by_kind))
    assert set(figures["forced"]) == {"direct", "tool"}
    assert figures["forced"]["direct"]["kinds"][PAINTING]["accuracy"] == 0.0
    for branch in figures["forced"].values():
        low, high = branch["interval"]
        assert 0.0 <= low <= branch["accuracy"] <= high <= 1.0
