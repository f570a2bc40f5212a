"""Killed by SIGKILL at ten random moments, a run ends where it would have ended, and trains on no rollout twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from metis_agent.hdpo.config import last_checkpoint
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Trajectory

from .policy_world import STRATIFIED, Noted, arguments, cold_start, rollouts_of, trainer_of

STEPS, KILLS = 8, 10
ROWS = 8
"""Rollouts a step."""


class Mortal(TrainerCallback):
    """Kills its process at the n-th thing that happens: a finished rollout, a step, or a checkpoint."""

    def __init__(self, after: int | None) -> None:
        self.left = after

    def tick(self, *_: Any) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick()


def train(folder: Path, after: int | None) -> None:
    """The run of one process; what it was trained on and what came of it is left in the folder."""
    torch.set_num_threads(1)
    mortal, model = Mortal(after), cold_start()
    rollouts = rollouts_of(model, folder)
    store_append = rollouts._store.append

    def append(trajectory: Trajectory) -> None:
        store_append(trajectory)
        mortal.tick()

    rollouts._store.append = append  # type: ignore[method-assign]
    args = arguments(
        folder, STRATIFIED, max_steps=STEPS, save_strategy="steps", save_steps=2, save_total_limit=2,
        optim="adamw_torch", learning_rate=1e-3, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer = trainer_of(folder, args, model=model, rollouts=rollouts, callbacks=[mortal])
    trainer._save_checkpoint = _ticking(trainer._save_checkpoint, mortal)  # type: ignore[method-assign]
    found = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    history = [entry for entry in trainer.state.log_history if "hdpo/rho" in entry]
    norms = [float(p.detach().double().norm()) for p in model.parameters()]
    (folder / "end.json").write_text(json.dumps({"history": history, "norms": norms}))


def _ticking(save: Any, mortal: Mortal) -> Any:
    """A kill may fall just before a checkpoint is written, or (in `on_save`) just after."""

    def saved(*arguments: Any) -> None:
        mortal.tick()
        save(*arguments)

    return saved


def in_a_process(folder: Path, after: int | None) -> int | None:
    # Forked, so that ten deaths do not cost ten imports of PyTorch.
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder, after))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_ten_times_a_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_process(whole, None) == 0
    rng = random.Random(0)
    for _ in range(KILLS):
        # Half a step of events on average: a run of eight steps can so die ten times.
        assert in_a_process(killed, rng.randint(1, ROWS)) == -signal.SIGKILL
    assert in_a_process(killed, None) == 0
    ours, theirs = (json.loads((folder / "end.json").read_text()) for folder in (killed, whole))
    assert [entry["step"] for entry in ours["history"]] == list(range(1, STEPS + 1))
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        for name in ("loss", "hdpo/accuracy", "hdpo/tool_rate", "hdpo/rho", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], abs=1e-4, nan_ok=True), (name, mine["step"])
    assert ours["norms"] == pytest.approx(theirs["norms"], abs=1e-4)
    runs = Counter(run.id for run in TrajectoryStore(killed / "trajectories", read_only=True).read())
    assert len(runs) == STEPS * ROWS
    assert set(runs.values()) == {1}  # none was run, and so none trained on, a second time


def test_a_finished_rollout_is_recalled_and_not_run_again(tmp_path: Path) -> None:
    first: Noted = rollouts_of(cold_start(), tmp_path)
    args = arguments(tmp_path, STRATIFIED, max_steps=1)
    trainer_of(tmp_path, args, rollouts=first).train()
    again = rollouts_of(cold_start(), tmp_path)
    trainer_of(tmp_path, args, rollouts=again).train()
    assert again.batches[0] == first.batches[0]
    assert TrajectoryStore(tmp_path / "trajectories", read_only=True).count() == ROWS
