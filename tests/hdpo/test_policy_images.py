"""A tiny Qwen3-VL is trained on rollouts of several turns with pictures in the question and from a tool."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from langchain_core.tools import tool

from metis_agent.agent import create_metis_agent
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.models.local import LocalChatModel
from metis_agent.models.vision import ImageReader
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts
from metis_agent.rules.budget import Budget
from metis_agent.worlds.gallery.cold_start import build_model
from metis_agent.worlds.gallery.pictures import as_png, draw, exhibit
from metis_agent.worlds.gallery.questions import questions
from metis_agent.worlds.gallery.tokens import build_processor

from .policy_world import STRATIFIED, arguments, coin, furthest, logged

CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call><|end|>'
PROCESSOR = build_processor()


@tool
def look() -> list[dict[str, Any]]:
    """Show another picture."""
    import base64

    picture = as_png(draw(exhibit("number", "large", random.Random(0))))
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "!"}]


class Looking(LocalChatModel):
    """Where a call is forced, a whole one is: random weights would not write one."""

    def _forced(self, choice: str, tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        return () if choice in ("auto", "none") else self._tokens.encode(CALL)


def seeing_model() -> Any:
    """Random weights, with logits small enough that what is sampled is random too."""
    torch.manual_seed(0)
    model = build_model(PROCESSOR)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.1)
    return model


def trainer_on_pictures(folder: Path, model: Any, *, images: ImageReader | None, **changed: Any) -> HDPOTrainer:
    chat = Looking(
        model=model, tokenizer=PROCESSOR.tokenizer, processor=PROCESSOR, temperature=1.0, max_new_tokens=40
    )  # fmt: skip
    rollouts = Rollouts(
        lambda gate: create_metis_agent(chat, [look], gate=gate, budget=Budget(calls=1)),
        TrajectoryStore(folder / "trajectories"),
    )
    asked = [
        *questions("train", 2),
        *(replace(each, id=f"text {each.id}", metadata={}) for each in questions("train", 1)),
    ]
    settings = {"max_steps": 1, "per_device_train_batch_size": 12, **changed}
    return HDPOTrainer(
        model, PROCESSOR.tokenizer, arguments(folder, STRATIFIED, **settings), questions=asked,
        rollouts=rollouts, verify=coin, images=images,
    )  # fmt: skip


def noted(trainer: HDPOTrainer) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    batches: list[dict[str, Any]] = []
    found: list[torch.Tensor] = []
    compute, ask = trainer._compute_loss, trainer._get_per_token_logps_and_entropies

    def loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        batches.append(inputs)
        return compute(model, inputs)

    def log_probs(*args: Any, **kwargs: Any) -> Any:
        result = ask(*args, **kwargs)
        found.append(result[0].detach())
        return result

    trainer._compute_loss = loss  # type: ignore[method-assign]
    trainer._get_per_token_logps_and_entropies = log_probs  # type: ignore[method-assign]
    return batches, found


def sampled(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The tokens that the policy chose itself: neither an observation nor forced."""
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool() & ~inputs["sampling_per_token_logps"].isnan()


def test_the_loss_sees_the_pictures_that_the_rollouts_saw(tmp_path: Path) -> None:
    """The trainer's log-probabilities are those of sampling, on every token, also after the tool's picture."""
    model, before = seeing_model(), seeing_model()
    trainer = trainer_on_pictures(
        tmp_path, model, images=ImageReader(PROCESSOR), per_device_train_batch_size=6,
        steps_per_generation=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    batches, found = noted(trainer)
    trainer.train()
    assert len(batches) == 2
    pictures = [count for inputs in batches for count in inputs["num_images"]]
    assert sorted(set(pictures)) == [0, 1, 2]  # text, a question's own, and that of the tool too
    for inputs, log_probs in zip(batches, found, strict=True):
        own = sampled(inputs)
        torch.testing.assert_close(log_probs[own], inputs["sampling_per_token_logps"][own], rtol=0, atol=1e-4)
        assert float(log_probs[own].mean()) < -0.1  # not so sure of itself that nothing could differ
    assert logged(trainer, "hdpo/excluded") == [0]
    moved = furthest(model.model.visual, before.model.visual)
    assert moved > 0  # the gradient reaches the eyes


def test_without_pixels_the_log_probabilities_would_be_others(tmp_path: Path) -> None:
    """What the test above could not see if pictures made no difference."""
    trainer = trainer_on_pictures(tmp_path, seeing_model(), images=None)
    batches, found = noted(trainer)
    trainer.train()
    own = sampled(batches[0])
    assert float((found[0][own] - batches[0]["sampling_per_token_logps"][own]).abs().max()) > 1e-3


def test_a_rollout_whose_pictures_are_lost_is_left_out_and_counted(tmp_path: Path) -> None:
    class Blind(ImageReader):
        def of(self, message: Any) -> list[Any]:
            return []

    trainer = trainer_on_pictures(tmp_path, seeing_model(), images=Blind(PROCESSOR))
    trainer.train()
    # Two questions of three have a picture. Of the third's rollouts the forced tool run saw the tool's.
    assert logged(trainer, "hdpo/excluded/images_do_not_fit") == [9]
