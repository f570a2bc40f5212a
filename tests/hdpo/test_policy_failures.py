"""What goes wrong in training: each handled, counted, and never learnt from as the model's mistake."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.tools import tool

from metis_agent.errors import ConfigurationError, InfrastructureError, JudgeUnavailableError, StorageError
from metis_agent.hdpo.config import check_arguments, last_checkpoint
from metis_agent.recording.shards import LocalShards
from metis_agent.types import Question

from .policy_world import LESSONS, STRATIFIED, arguments, coin, cold_start, furthest, logged, rollouts_of, trainer_of


def test_a_judge_that_is_down_now_and_then_excludes_and_is_counted(tmp_path: Path) -> None:
    asked = []

    def flaky(question: Question, answer: str) -> bool:
        asked.append(answer)
        if len(asked) % 3 == 0:
            raise JudgeUnavailableError("503")
        return coin(question, answer)

    trainer = trainer_of(tmp_path, arguments(tmp_path, STRATIFIED), verify=flaky)
    trainer.train()
    assert logged(trainer, "hdpo/excluded/judge_unavailable") == logged(trainer, "hdpo/excluded") == [2, 3]


def test_a_judge_that_is_down_for_good_ends_the_run_and_another_judges_the_kept_rollouts(tmp_path: Path) -> None:
    def down(question: Question, answer: str) -> bool:
        raise JudgeUnavailableError("503")

    model = cold_start()
    rollouts = rollouts_of(model, tmp_path)
    with pytest.raises(InfrastructureError, match=r"judge unavailable.*run again"):
        trainer_of(tmp_path, model=model, rollouts=rollouts, verify=down).train()
    assert furthest(model, cold_start()) == 0
    kept = {run.id: run for run in rollouts.batches[0]}
    again = rollouts_of(model, tmp_path)
    trainer_of(tmp_path, model=model, rollouts=again).train()
    assert {run.id: run for run in again.batches[0]} == kept


def test_a_rollout_that_never_ends_is_left_out_after_its_time(tmp_path: Path) -> None:
    stuck = 0

    @tool("python")
    async def hanging(code: str) -> str:
        """Hang, every other time."""
        nonlocal stuck
        stuck += 1
        if stuck % 2:
            await asyncio.sleep(3_600)
        return "1"

    model = cold_start()
    rollouts = rollouts_of(model, tmp_path, tools=[hanging], timeout=8.0)
    trainer = trainer_of(tmp_path, arguments(tmp_path, STRATIFIED, max_steps=1), model=model, rollouts=rollouts)
    # The tool's own limit is the same, so whichever comes first: the run ends, and the others are trained on.
    trainer.train()
    runs = rollouts.batches[0]
    late = [run for run in runs if "TimeoutError" in run.error]
    timed_out = [run for run in runs for outcome in run.outcomes if outcome.status == "timeout"]
    assert len(late) + len(timed_out) >= 1
    assert logged(trainer, "hdpo/excluded") == [len(late)]


def test_a_full_disk_ends_the_run_with_the_store_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cold_start()
    rollouts = rollouts_of(model, tmp_path)
    append = LocalShards.append
    written = 0

    def full(self: LocalShards, line: bytes, **_: Any) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise StorageError(errno.ENOSPC, "No space left on device")
        append(self, line)

    monkeypatch.setattr(LocalShards, "append", full)
    with pytest.raises(StorageError, match="No space left"):
        trainer_of(tmp_path, model=model, rollouts=rollouts).train()
    monkeypatch.undo()
    again = rollouts_of(model, tmp_path)
    trainer_of(tmp_path, model=model, rollouts=again).train()
    ids = [run.id for run in again._store.read()]
    assert len(ids) == len(set(ids)) == 16  # what was kept was not run again


def test_a_checkpoint_that_does_not_fit_is_removed_and_the_one_before_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, STRATIFIED, save_strategy="steps", save_steps=1, max_steps=3)
    trainer = trainer_of(tmp_path, args)
    save = torch.save
    saved = 0

    def full(*positional: Any, **named: Any) -> None:
        nonlocal saved
        saved += 1
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*positional, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"checkpoint-2.*No space left.*Make room"):
        trainer.train()
    assert saved > 1
    assert not (tmp_path / "checkpoint-2").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((1, '{"global_step": 1}'), (2, '{"global_'), (10, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert last_checkpoint(tmp_path / "nowhere") is None


def nan_at(trainer: Any, steps: set[int]) -> None:
    compute = trainer._compute_loss

    def loss(model: Any, inputs: Any) -> torch.Tensor:
        return compute(model, inputs) * (float("nan") if trainer.state.global_step in steps else 1.0)

    trainer._compute_loss = loss


def test_an_update_whose_gradient_is_no_number_is_skipped_and_counted(tmp_path: Path) -> None:
    model = cold_start()
    trainer = trainer_of(
        tmp_path, arguments(tmp_path, STRATIFIED, max_steps=3, optim="adamw_torch", learning_rate=1e-3), model=model
    )  # fmt: skip
    nan_at(trainer, {1})
    trainer.train()
    assert logged(trainer, "hdpo/skipped_updates") == [0, 1, 0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert furthest(model, cold_start()) > 0


def test_a_gradient_that_stays_no_number_ends_the_run_with_the_weights_as_they_were(tmp_path: Path) -> None:
    model = cold_start()
    trainer = trainer_of(tmp_path, arguments(tmp_path, STRATIFIED, max_steps=4, bad_updates=2), model=model)
    nan_at(trainer, {0, 1, 2, 3})
    with pytest.raises(InfrastructureError, match=r"2 updates running.*smaller learning_rate"):
        trainer.train()
    assert furthest(model, cold_start()) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 6}, "must be divisible by num_generations"),
        ({"eval_strategy": "steps", "do_eval": True}, "Validation"),
        ({"forced_direct": 3, "forced_tool": 3}, "don't fit in size=4"),
        ({"objective": "ppo"}, "name='ppo'"),
        ({"w_tool": -1.0}, r"w_tool=-1\.0"),
        ({"bad_updates": 0}, "bad_updates=0"),
        (
            {
                "per_device_train_batch_size": 4, "steps_per_generation": 2, "gradient_accumulation_steps": 1,
                "save_strategy": "steps", "save_steps": 3,
            },
            "can't be resumed exactly",
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        arguments(tmp_path, STRATIFIED, **changed)


def test_a_group_is_never_spread_over_processes(tmp_path: Path) -> None:
    # Two processes with six rollouts each are three whole groups together, and none of them keeps to one process.
    args = arguments(tmp_path, STRATIFIED, per_device_train_batch_size=4)
    args.per_device_train_batch_size = 6
    with pytest.raises(ConfigurationError, match=r"is 6 rollouts a process.*never spread over processes"):
        check_arguments(args, STRATIFIED)


def test_rollouts_say_what_is_wrong_with_their_limits(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="timeout=0"):
        rollouts_of(cold_start(), tmp_path, timeout=0)
    assert len(LESSONS) == 8
