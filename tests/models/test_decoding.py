import random
from typing import Any

import pytest
import torch
from torch import Tensor

from metis_agent.models.decoding import RunningBatch
from metis_agent.models.sampler import RowSampling

from .teacher import teacher_forced

Prompt = tuple[int, ...]


def prompts_of(*lengths: int) -> list[Prompt]:
    shuffled = random.Random(sum(lengths))
    return [tuple(shuffled.choices(range(4, 100), k=length)) for length in lengths]


def batch_of(policy: Any, prompts: list[Prompt], *, seed: int = 0, **sampling: Any) -> RunningBatch:
    rows = [RowSampling(temperature=1.0, seed=seed + row, **sampling) for row in range(len(prompts))]
    return RunningBatch(policy, prompts, rows, pad_id=0, steps=40)


def chosen(batch: RunningBatch, steps: int) -> Tensor:
    """So many tokens of each row with their log-probabilities: (A, T, 2)."""
    parts = []
    for _ in range(steps):
        tokens_A, log_probs_A2 = batch.step()
        parts.append(torch.stack([tokens_A.double(), log_probs_A2[:, 0].double()], dim=1))
    return torch.stack(parts, dim=1)


def told(*parts: Tensor) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one row, of parts (T, 2)."""
    whole = torch.cat(parts)
    return whole[:, 0].int().tolist(), whole[:, 1].tolist()


@pytest.mark.parametrize("joining", [(3, 1), (60, 2), (20, 21), (1, 1)], ids=str)
@pytest.mark.parametrize("running", [(20, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("before", [0, 1, 9])
def test_joined_rows_are_those_of_a_plain_forward_pass(
    policy: Any, running: tuple[int, int], joining: tuple[int, int], before: int
) -> None:
    prompts = prompts_of(*running, *joining)
    batch = batch_of(policy, prompts[:2])
    early = chosen(batch, before) if before else torch.zeros(2, 0, 2)
    batch.join(batch_of(policy, prompts[2:], seed=2))
    late = chosen(batch, 6)
    for row, prompt in enumerate(prompts):
        tokens, log_probs = told(*([early[row]] if row < 2 else []), late[row])
        assert log_probs == pytest.approx(teacher_forced(policy, prompt, tokens), abs=1e-4)
        alone = chosen(batch_of(policy, [prompt], seed=row), len(tokens))[0]
        assert told(alone)[0] == tokens


def test_rows_that_stay_when_others_leave_go_on_as_they_were(policy: Any) -> None:
    prompts = prompts_of(50, 5, 9)
    batch = batch_of(policy, prompts)
    early = chosen(batch, 4)
    batch.keep(torch.tensor([2, 1]))
    late = chosen(batch, 4)
    for place, row in enumerate([2, 1]):
        tokens, log_probs = told(early[row], late[place])
        assert log_probs == pytest.approx(teacher_forced(policy, prompts[row], tokens), abs=1e-4)


def test_what_is_forced_goes_on_where_it_was_when_rows_join_and_leave(policy: Any) -> None:
    batch = batch_of(policy, prompts_of(5, 6), forced=(20, 21, 22, 23))
    early = chosen(batch, 2)
    batch.join(batch_of(policy, prompts_of(7), seed=2, forced=(30, 31, 32)))
    batch.keep(torch.tensor([1, 2]))
    late = chosen(batch, 3)[..., 0].int().tolist()
    assert early[:, :, 0].int().tolist() == [[20, 21]] * 2
    assert late[0][:2] == [22, 23]
    assert late[1] == [30, 31, 32]


def test_a_batch_that_never_empties_stays_as_wide_as_its_longest_row(policy: Any) -> None:
    batch = batch_of(policy, prompts_of(10))
    widths = []
    for _ in range(30):
        chosen(batch, 4)
        batch.join(batch_of(policy, prompts_of(10)))
        chosen(batch, 4)
        batch.keep(torch.tensor([1]))  # joined last: 10 tokens of prompt, 4 of its own, of which one is yet to be run
        (layer, *_) = batch._cache.layers
        widths.append(layer.keys.shape[2])
        assert batch._width == widths[-1] + 1
    assert widths == [13] * 30
