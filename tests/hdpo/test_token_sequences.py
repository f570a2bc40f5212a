"""Rollouts whose history is rewritten are trained on, segment by segment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from metis_agent.hdpo.loss import hdpo_loss
from metis_agent.hdpo.token_sequences import in_pieces, rows_learnt, segments

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


def test_rows_read_in_pieces_give_what_they_give_at_once_for_less(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, arguments(tmp_path, max_steps=1), model=cold_start())
    assert trainer.model is not None
    model, rng = trainer.model.eval(), torch.Generator().manual_seed(0)
    prompts, replies = [3, 9, 9, 4, 2, 9, 5, 8], [30, 4, 5, 1, 29, 12, 6, 2]
    attention = torch.zeros(8, 9 + 30, dtype=torch.long)
    for row, (before, after) in enumerate(zip(prompts, replies, strict=True)):
        attention[row, 9 - before : 9 + after] = 1
    ids = torch.randint(5, 100, attention.shape, generator=rng)
    ids[4], attention[4] = ids[0], attention[0]  # the same rollout twice, learnt in one of them only
    learnt = torch.tensor([True, False, True, False, False, False, True, True])
    read_tokens = [0, 0]

    def read(ids: torch.Tensor, attention: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        read_tokens[torch.is_grad_enabled()] += ids.numel()
        return trainer._get_per_token_logps_and_entropies(model, ids, attention, width, compute_entropy=True)[:2]  # type: ignore[no-any-return]

    whole, pieces = read(ids, attention, 30), in_pieces(read, ids, attention, 30, learnt)
    own = attention[:, 9:].bool()
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(torch.where(own, one, 0.0), torch.where(own, other, 0.0), rtol=1e-4, atol=1e-5)
    gradients = []
    for log_probs in (whole[0], pieces[0]):
        gradients.append(torch.autograd.grad((log_probs * own * learnt[:, None]).sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    # Once at once, padding and all; then each row once, a fifth of padding at most, and a graph for what is learnt.
    distinct = [row for row in range(8) if row != 4]
    assert read_tokens[True] - ids.numel() <= int(attention[learnt].sum()) / 0.8
    assert sum(read_tokens) - ids.numel() <= int(attention[distinct].sum()) / 0.8


def test_a_batch_that_teaches_nothing_still_has_something_to_go_back_through() -> None:
    assert rows_learnt({"advantages": torch.zeros(3), "contrasts": torch.zeros(3, 2)}).tolist() == [True, False, False]
    found = rows_learnt({"advantages": torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "tool_advantages": torch.zeros(2)})
    assert found.tolist() == [True, False]
