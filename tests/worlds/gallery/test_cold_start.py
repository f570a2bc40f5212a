"""The recipe in small: eyes and model lower their losses, and what is left behind is a model that loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metis_agent.models.local import LocalChatModel
from metis_agent.rollouts.runner import question_message
from metis_agent.types import TOKEN_RECORD
from metis_agent.worlds.gallery.cold_start import (
    Recipe,
    SightStage,
    Stage,
    _rates,
    build_model,
    train_cold_start,
    train_language,
)
from metis_agent.worlds.gallery.questions import questions
from metis_agent.worlds.gallery.tokens import build_processor

LOOKING = ((("read", "number", "large"), 4), (("point", "chart", "tiny"), 4))
ACTING = ((("act", "number", "tiny"), 3), ("painting", 2))
SMALL = replace(
    Recipe(),
    sight=(
        SightStage(steps=25, pictures=(("number", 4), ("word", 2)), rates=(1.0, 0.5)),
        SightStage(steps=5, pictures=(("chart", 3),), rates=(0.5, 0.5)),
    ),
    stages=(
        Stage(steps=10, lessons=LOOKING, rates=(1.0, 1.0)),  # type: ignore[arg-type]
        Stage(steps=4, lessons=ACTING, rates=(1.0, 0.0)),  # type: ignore[arg-type]
    ),
    pool=1,
    fresh=0,
    warmup=4,
)


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_and_the_folder_loads(tmp_path: Path) -> None:
    losses: list[float] = []
    train_cold_start(tmp_path, SMALL, progress=lambda step, loss, model: losses.append(loss))
    assert len(losses) == SMALL.steps == 44
    assert sum(losses[20:25]) < 0.9 * sum(losses[:5])
    assert losses[39] < 0.7 * losses[30]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000
    chat = LocalChatModel.load(tmp_path, max_new_tokens=2)
    assert sum(parameter.numel() for parameter in chat.model.parameters()) < 700_000
    (question,) = questions("test", 1)
    assert chat.invoke([question_message(question)]).response_metadata[TOKEN_RECORD]["completion_ids"]


def test_only_the_first_stage_warms_up_and_rates_go_evenly_from_first_to_last() -> None:
    stage = replace(SMALL.stages[0], steps=10, rates=(1.0, 0.0))
    assert _rates(stage, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert _rates(stage, warmup=0) == pytest.approx([1.0 - place / 10 for place in range(10)])


def test_the_language_model_learns_the_same_behind_the_same_eyes_and_leaves_them_alone() -> None:
    processor = build_processor()
    recipe = replace(SMALL, stages=(replace(SMALL.stages[0], steps=2),))
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model(processor)
        eyes = {name: weight.clone() for name, weight in model.model.visual.state_dict().items()}
        train_language(model, processor, recipe)
        assert all(torch.equal(eyes[name], weight) for name, weight in model.model.visual.state_dict().items())
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
