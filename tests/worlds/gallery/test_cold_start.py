"""The recipe in small: eyes and model lower their losses, and what is left behind is a model that loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metis_agent.hdpo.rollouts import question_message
from metis_agent.models.local import LocalChatModel
from metis_agent.types import TOKEN_RECORD
from metis_agent.worlds.gallery.cold_start import Recipe, Stage, train_cold_start
from metis_agent.worlds.gallery.questions import questions

LOOKING = ((("read", "number", "large"), 4), (("point", "chart", "tiny"), 4))
ACTING = ((("act", "number", "tiny"), 3), ("painting", 2))
SMALL = replace(
    Recipe(),
    sight_steps=30,
    sight_pictures=(("number", 4), ("chart", 2)),
    stages=(
        Stage(steps=10, lessons=LOOKING, rates=(1.0, 1.0)),  # type: ignore[arg-type]
        Stage(steps=4, lessons=ACTING, rates=(1.0, 0.0)),  # type: ignore[arg-type]
    ),
    pool=1,
    fresh=0,
    warmup=4,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_few_steps_lower_the_loss_and_the_folder_loads(tmp_path: Path) -> None:
    losses: list[float] = []
    train_cold_start(tmp_path, SMALL, progress=lambda step, loss, model: losses.append(loss))
    assert len(losses) == SMALL.steps == 44
    assert sum(losses[25:30]) < 0.9 * sum(losses[:5])
    assert losses[39] < 0.7 * losses[30]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000_000
    chat = LocalChatModel.load(tmp_path, max_new_tokens=2)
    assert sum(parameter.numel() for parameter in chat.model.parameters()) < 700_000
    (question,) = questions("test", 1)
    assert chat.invoke([question_message(question)]).response_metadata[TOKEN_RECORD]["completion_ids"]


def test_rates_warm_up_and_go_from_stage_to_stage() -> None:
    from metis_agent.worlds.gallery.cold_start import _schedule

    stages = tuple(replace(stage, steps=10) for stage in SMALL.stages)
    rates = [rate for _, rate in _schedule(replace(SMALL, stages=stages, warmup=4))]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[11:] == pytest.approx([1.0 - place / 10 for place in range(1, 10)])
