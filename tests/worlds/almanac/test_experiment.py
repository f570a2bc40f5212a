"""Small real runs of the whole loop: the shipped cold start, the graph, the sandbox, the trainer, a kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metis_agent.evaluation.agents import Probes
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.worlds.almanac.experiment import COLD_START, Experiment

STEPS, QUESTIONS, G = 4, 5, 4
RUN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.worlds.almanac.test_experiment import experiment
experiment(Path(sys.argv[1])).train(on_step=lambda metrics: print(int(metrics["step"]), flush=True))
"""


def experiment(folder: Path) -> Experiment:
    return Experiment(
        folder=folder, steps=STEPS, questions_per_step=QUESTIONS, groups=StratifiedGroups(size=G, direct=1, tool=1),
        test_questions=5, probes=Probes(direct=2, tool=1), checkpoint_every=1, seed=3,
    )  # fmt: skip


def train(folder: Path, *, kill_after: int | None = None) -> None:
    """Train in a process of its own; kill it once so many rollouts are stored."""
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", RUN, str(folder)], env=environment)
    if kill_after is not None:
        until = time.monotonic() + 120
        while stored(folder) < kill_after and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    else:
        assert process.wait(timeout=150) == 0


def stored(folder: Path) -> int:
    shards = (folder / "trajectories" / "train").glob("*.jsonl")
    return sum(shard.read_bytes().count(b"\n") for shard in shards)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder)
    return folder


# Of the trainer alone, `tests/hdpo/test_policy_kill.py` shows it on every run.
@pytest.mark.exhaustive
def test_a_run_that_is_killed_twice_ends_as_one_that_was_not(uninterrupted: Path, tmp_path: Path) -> None:
    whole = STEPS * QUESTIONS * G
    train(tmp_path, kill_after=7)  # within the first step, before any checkpoint
    train(tmp_path, kill_after=2 * QUESTIONS * G + 7)  # within the third
    kept = set(TrajectoryStore(tmp_path / "trajectories" / "train", read_only=True).ids())
    assert len(kept) >= 2 * QUESTIONS * G + 7
    train(tmp_path)
    store = TrajectoryStore(tmp_path / "trajectories" / "train", read_only=True)
    ids = Counter(trajectory.id for trajectory in store.read())
    assert kept <= set(ids)
    assert len(ids) == whole
    assert set(ids.values()) == {1}  # nothing was rolled out twice
    expected = load_file(uninterrupted / "policy" / "model.safetensors")
    for name, weight in load_file(tmp_path / "policy" / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4)


@pytest.mark.slow
def test_training_changes_the_policy_and_every_rollout_says_which_weights_made_it(uninterrupted: Path) -> None:
    start, end = (load_file(folder / "model.safetensors") for folder in (COLD_START, uninterrupted / "policy"))
    assert max(float((end[name] - start[name]).abs().max()) for name in end) > 1e-4
    store = TrajectoryStore(uninterrupted / "trajectories" / "train", read_only=True)
    for trajectory in store.read():
        step = trajectory.id.split("/")[1]
        assert {call.weights_version for call in trajectory.calls} == {step}


def test_measuring_goes_on_where_it_was_stopped_and_gives_plain_numbers(tmp_path: Path) -> None:
    seen: list[str] = []
    run = experiment(tmp_path)
    before = run.measure(COLD_START, "cold", progress=lambda trajectory: seen.append(trajectory.id))
    assert len(seen) == len(set(seen)) == 5 * 4
    again = run.measure(COLD_START, "cold")
    assert [run.answer for run in again.trajectories] == [run.answer for run in before.trajectories]
    assert stored_lines(tmp_path / "trajectories" / "cold") == 20
    figures = json.loads(json.dumps(before.to_dict()))
    assert figures["questions"] == 5
    assert 0 <= figures["accuracy"] <= 1
    assert figures["redundant_rate"] == 1.0  # the cold start calls a tool for what it knows


def stored_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def test_the_cold_start_is_small_and_knows_what_it_should() -> None:
    assert sum(path.stat().st_size for path in COLD_START.iterdir()) < 5_000_000
    chat = LocalChatModel.load(COLD_START, max_new_tokens=24)
    direct = chat.bind_tools([{"name": "python", "description": "", "parameters": {}}], tool_choice="none")
    assert direct.invoke("What is the capital of France?").text == "Paris"
    assert direct.invoke("hi").text == "Hello! How can I help?"
    assert direct.invoke("What is 47 + 35?").text == "82"
