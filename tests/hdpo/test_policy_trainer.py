"""The trainer against TRL's own update, and against the loss in `hdpo.loss`. Rollouts are real runs of the graph."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from langchain_core.tools import tool
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from metis_agent.errors import ConfigurationError, SandboxGoneError
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.loss import clipped_surrogate, hdpo_loss
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.hdpo.rewards import score
from metis_agent.hdpo.token_sequences import segments
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import groups_of

from .policy_world import (
    FREE,
    LESSONS,
    STRATIFIED,
    TOKENIZER,
    Noted,
    coin,
    cold_start,
    fresh_model,
    logged,
    rollouts_of,
    trainer_of,
    trl_settings,
)


def arguments(folder: Path, groups: StratifiedGroups, **changed: Any) -> GRPOConfig:
    """TRL's own, as somebody passes it who has a configuration of TRL."""
    return GRPOConfig(**{**trl_settings(folder, groups), **changed})


def trained(
    folder: Path, model: Qwen3ForCausalLM, objective: Objective, groups: StratifiedGroups, **changed: Any
) -> tuple[HDPOTrainer, Noted]:
    rollouts = rollouts_of(model, folder)
    args = arguments(folder, groups, **changed)
    trainer = trainer_of(folder, args, model=model, rollouts=rollouts, objective=objective, groups=groups)
    trainer.train()
    return trainer, rollouts


def test_without_the_tool_channel_the_update_is_trls_own(tmp_path: Path) -> None:
    # With this seed no reply of the untrained model begins a call: one that slips is told so, and replies once more.
    ours, noted = trained(tmp_path / "ours", fresh_model(), Objective(w_tool=0.0), FREE, seed=1)
    assert all(len(segments(run)) == 1 for batch in noted.batches for run in batch)
    steps = iter(noted.batches)

    def same_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[object]]:
        batch = next(steps)
        rows = [segments(run)[0] for run in batch]
        return {
            "prompt_ids": [list(row.prompt_ids) for row in rows],
            "completion_ids": [list(row.completion_ids) for row in rows],
            "logprobs": [list(row.log_probs) for row in rows],
            "env_mask": [list(row.mask) for row in rows],
            "reward": score(groups_of(batch, 4), coin).r_acc.flatten().tolist(),
        }

    theirs = GRPOTrainer(
        fresh_model(),
        [lambda completions, reward, **_: reward],
        args=arguments(tmp_path / "theirs", FREE, seed=1),
        processing_class=TOKENIZER,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": it.text}]} for it in LESSONS]),
        rollout_func=same_rollouts,
    )
    theirs.train()
    start = fresh_model().state_dict()
    moved = max(float((weight - start[name]).abs().max()) for name, weight in ours.model.state_dict().items())
    assert moved > 1e-4  # or the comparison says nothing
    for name, weight in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_the_loss_is_that_of_hdpo_loss(tmp_path: Path) -> None:
    trainer, noted = trained(tmp_path, fresh_model(), Objective(w_tool=0.5), FREE)
    batch = noted.batches[-1]
    A_acc, A_tool = torch.randn(2, len(batch), generator=torch.Generator().manual_seed(1))
    rows = [segments(run)[0] for run in batch]
    width = max(len(row.completion_ids) for row in rows)
    prompt_width = max(len(row.prompt_ids) for row in rows)
    pad = TOKENIZER.pad_token_id

    def padded(values: Sequence[Sequence[float]], fill: float, *, to: int, left: bool = False) -> torch.Tensor:
        return torch.tensor(
            [[fill] * (to - len(v)) + list(v) if left else list(v) + [fill] * (to - len(v)) for v in values]
        )

    inputs = {
        "prompt_ids": padded([row.prompt_ids for row in rows], pad, to=prompt_width, left=True),
        "prompt_mask": padded([[1] * len(row.prompt_ids) for row in rows], 0, to=prompt_width, left=True),
        "completion_ids": padded([row.completion_ids for row in rows], pad, to=width),
        "completion_mask": padded([[1] * len(row.completion_ids) for row in rows], 0, to=width),
        "tool_mask": padded([row.mask for row in rows], 1, to=width),
        "old_per_token_logps": padded([[lp - 0.3 for lp in row.log_probs] for row in rows], 0.0, to=width),
        "advantages": A_acc,
        "tool_advantages": A_tool,
    }
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    inputs["num_items_in_batch"] = mask.sum()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        width,
    )
    old = inputs["old_per_token_logps"]
    expected = hdpo_loss(
        log_probs, old, A_acc, A_tool, mask, w_tool=0.5, normaliser="dapo", total_tokens=mask.sum()
    )  # fmt: skip
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)

    # With rollouts from vLLM, both channels are corrected by how its log-probabilities differ from the trainer's.
    ratio = inputs["importance_sampling_ratio"] = 0.5 + torch.rand(
        mask.shape, generator=torch.Generator().manual_seed(2)
    )
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    corrected = [
        clipped_surrogate(log_probs, old, A, mask, normaliser="dapo", total_tokens=mask.sum(), correction=ratio).loss
        for A in (A_acc, A_tool)
    ]
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    torch.testing.assert_close(loss, corrected[0] + 0.5 * corrected[1], rtol=1e-5, atol=1e-6)


def test_forced_rollouts_take_their_branch_and_are_weighted_whole(tmp_path: Path) -> None:
    trainer, noted = trained(tmp_path, cold_start(), Objective(), STRATIFIED)
    for run in noted.batches[-1]:
        if run.branch == "direct":
            assert run.tool_calls == 0
        if run.branch == "tool":
            assert run.calls[0].forced >= 1  # the opening of a call, and the name where there is one tool
    step = trainer._step_batch
    by_row = step.by_row(torch.arange(1.0, 9.0).reshape(2, 4))
    torch.testing.assert_close(by_row, torch.arange(1.0, 9.0) * torch.as_tensor(step.weights).float().flatten())
    assert not torch.allclose(by_row, torch.arange(1.0, 9.0))


def test_metrics_are_logged_at_every_step(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, cold_start(), Objective(), STRATIFIED)
    assert len(logged(trainer, "hdpo/rho")) == 2
    assert len(accuracy := logged(trainer, "hdpo/accuracy")) == 2
    assert all(map(math.isfinite, accuracy))
    assert logged(trainer, "hdpo/excluded") == [0, 0]


def test_a_sandbox_that_dies_excludes_its_rollouts_and_is_not_scored(tmp_path: Path) -> None:
    """Reference mistake: a failed tool server was scored 0 and trained on as the model's error."""

    @tool("python")
    def dying(code: str) -> str:
        """Die."""
        raise SandboxGoneError("the sandbox is gone")

    model = cold_start()
    trainer = trainer_of(
        tmp_path, arguments(tmp_path, STRATIFIED), model=model, rollouts=rollouts_of(model, tmp_path, tools=(dying,)),
        groups=STRATIFIED,
    )  # fmt: skip
    trainer.train()
    runs = list(TrajectoryStore(tmp_path / "trajectories", read_only=True).read())
    failed = [run for run in runs if run.status == "failed"]
    assert failed
    assert all("SandboxGoneError" in run.error and not run.answer for run in failed)
    assert sum(logged(trainer, "hdpo/excluded")) == len(failed) < len(runs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 2}, "num_generations=2"),
        ({"loss_type": "cispo"}, "cispo"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trainer_of(tmp_path, arguments(tmp_path, FREE, **settings), model=fresh_model(), groups=FREE)


def test_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="distinct"):
        trainer_of(tmp_path, model=fresh_model(), questions=[*LESSONS, LESSONS[0]])
