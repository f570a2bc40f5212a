"""Rollouts whose history is rewritten are trained on, segment by segment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metis_agent.hdpo.loss import hdpo_loss
from metis_agent.hdpo.token_sequences import segments

from .policy_world import arguments, cold_start, logged, rewriting_tokenizer, rollouts_of, trainer_of


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_a_template_that_is_not_append_only_splits_rollouts_and_all_segments_are_trained_on(
    tmp_path: Path, loss_type: str
) -> None:
    model, tokenizer = cold_start(), rewriting_tokenizer()
    rollouts = rollouts_of(model, tmp_path, tokenizer)
    args = arguments(tmp_path, max_steps=1, loss_type=loss_type, forced_tool=2)
    trainer = trainer_of(tmp_path, args, model=model, tokenizer=tokenizer, rollouts=rollouts)
    batches: list[dict[str, torch.Tensor]] = []
    compute = trainer._compute_loss
    losses: list[torch.Tensor] = []

    def noted(model: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(inputs)
        losses.append(compute(model, inputs))  # type: ignore[arg-type]
        return losses[-1]

    trainer._compute_loss = noted  # type: ignore[method-assign]
    trainer.train()
    runs = rollouts.batches[0]
    found = [segments(run) for run in runs]
    split = sum(len(each) - 1 for each in found)
    assert split > 0
    assert logged(trainer, "hdpo/excluded") == [0]
    assert logged(trainer, "hdpo/split") == [split]
    assert logged(trainer, "hdpo/segments") == pytest.approx([1 + split / len(runs)])

    # Every token of the model's own is in the batch once, and the loss is that of `hdpo_loss` on those rows.
    (inputs,) = batches
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    written = sorted(
        token
        for each in found
        for part in each
        for token, own in zip(part.completion_ids, part.mask, strict=True)
        if own
    )
    assert sorted(inputs["completion_ids"][mask.bool()].tolist()) == written
    model.train(True)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    fresh = trainer_of(tmp_path / "fresh", args, model=cold_start(), tokenizer=tokenizer)
    log_probs, _, _ = fresh._get_per_token_logps_and_entropies(
        fresh.model, ids, attention, inputs["completion_ids"].shape[1]
    )
    expected = hdpo_loss(
        log_probs, log_probs.detach(), inputs["advantages"], inputs["tool_advantages"], mask,
        w_tool=0.15, normaliser=loss_type, total_tokens=mask.sum(),  # type: ignore[arg-type]
    )  # fmt: skip
    torch.testing.assert_close(losses[0], expected.loss, rtol=1e-4, atol=1e-6)


def test_more_rows_than_asked_for_still_fit_into_whole_micro_batches(tmp_path: Path) -> None:
    model, tokenizer = cold_start(), rewriting_tokenizer()
    rollouts = rollouts_of(model, tmp_path, tokenizer)
    args = arguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=2,
        forced_tool=2,
    )  # fmt: skip
    trainer = trainer_of(tmp_path, args, model=model, tokenizer=tokenizer, rollouts=rollouts)
    trainer.train()
    rows = [
        len(found) for found in (trainer._buffered_inputs[0]["advantages"], trainer._buffered_inputs[1]["advantages"])
    ]
    assert rows[0] == rows[1]
    found = sum(len(segments(run)) for run in rollouts.batches[-1])
    assert sum(rows) == -(-found // 4) * 4
