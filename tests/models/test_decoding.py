"""Tokens are chosen as their row says, whatever else is in the batch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metis_agent.errors import ConfigurationError
from metis_agent.models.decoding import RowSampling, RunningBatch, TokenChooser

from .teacher import teacher_forced

CPU = torch.device("cpu")
# Token probabilities 0.1, 0.2, 0.3, 0.4 at temperature 1.
PROBABILITIES = [0.1, 0.2, 0.3, 0.4]


def choose(
    *rows: RowSampling, steps: int = 1, probabilities: list[float] = PROBABILITIES
) -> tuple[list[list[int]], Tensor]:
    """Tokens (rows x steps) and log-probabilities of all for rows that all see the same distribution."""
    tokens, log_probs = choose_both(*rows, steps=steps, probabilities=probabilities)
    return tokens, log_probs[..., 0]


def choose_both(
    *rows: RowSampling, steps: int = 1, probabilities: list[float] = PROBABILITIES
) -> tuple[list[list[int]], Tensor]:
    """The same with both log-probabilities: among all tokens, among those that are not banned."""
    chooser = TokenChooser(rows, CPU)
    tokens, log_probs = [], []
    for _ in range(steps):
        scores = torch.tensor(probabilities).log().repeat(len(rows), 1) + 7.0  # logits have no fixed zero
        scores = chooser(torch.zeros(len(rows), 1, dtype=torch.long), scores)
        assert (scores > -torch.inf).sum(dim=1).tolist() == [1] * len(rows)
        tokens.append(scores.argmax(dim=1).tolist())
        log_probs.append(chooser.log_probs_B2)
    return [list(row) for row in zip(*tokens, strict=True)], torch.stack(log_probs, dim=1)


class FixedUniform:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, seed: int) -> Any:
        return self

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize(
    ("uniform", "token"),
    # The CDF is 0.1, 0.3, 0.6, 1.0: the token is the first whose CDF exceeds the uniform.
    [(0.0, 0), (0.09, 0), (0.11, 1), (0.29, 1), (0.31, 2), (0.59, 2), (0.61, 3), (1 - 2**-53, 3)],
)
def test_inverse_cdf(monkeypatch: pytest.MonkeyPatch, uniform: float, token: int) -> None:
    monkeypatch.setattr("metis_agent.models.decoding.random.Random", FixedUniform(uniform))
    tokens, log_probs = choose(RowSampling(temperature=1.0))
    assert tokens == [[token]]
    assert log_probs.item() == pytest.approx(math.log(PROBABILITIES[token]), abs=1e-6)


def test_greedy_takes_the_best_and_scores_it_at_temperature_one() -> None:
    tokens, log_probs = choose(RowSampling())
    assert tokens == [[3]]
    assert log_probs.item() == pytest.approx(math.log(0.4), abs=1e-6)


def test_temperature_sharpens_the_recorded_distribution() -> None:
    # At temperature 1/2 probabilities are squared: .01 .04 .09 .16, sum .30.
    tokens, log_probs = choose(RowSampling(temperature=0.5, forced=(1,)))
    assert tokens == [[1]]
    assert log_probs.item() == pytest.approx(math.log(0.04 / 0.30), abs=1e-6)


def test_forced_tokens_come_first_with_the_policys_own_log_probability() -> None:
    tokens, log_probs = choose(RowSampling(forced=(0, 1)), RowSampling(forced=(2,)), RowSampling(), steps=3)
    assert tokens == [[0, 1, 3], [2, 3, 3], [3, 3, 3]]
    assert log_probs[0].tolist() == pytest.approx([math.log(0.1), math.log(0.2), math.log(0.4)], abs=1e-6)


def test_banned_token_is_never_drawn_and_the_others_keep_their_log_probability() -> None:
    rows = [RowSampling(temperature=1.0, seed=seed, banned=(3,)) for seed in range(300)]
    tokens, log_probs = choose(*rows)
    drawn = [token for (token,) in tokens]
    assert set(drawn) == {0, 1, 2}
    assert log_probs[:, 0].tolist() == pytest.approx([math.log(PROBABILITIES[t]) for t in drawn], abs=1e-6)
    # Conditional on no token 3 the frequencies are 1/6, 2/6, 3/6; 300 draws have a standard error below .03.
    assert drawn.count(2) / 300 == pytest.approx(0.5, abs=0.1)


def test_a_banned_token_takes_no_part_in_the_second_log_probability() -> None:
    barred, forced, free = RowSampling(banned=(3,)), RowSampling(banned=(3,), forced=(1,)), RowSampling()
    tokens, log_probs = choose_both(barred, forced, free, RowSampling(banned=(3,), top_k=1))
    assert tokens == [[2], [1], [3], [2]]
    assert log_probs[:, 0, 0].exp().tolist() == pytest.approx([0.3, 0.2, 0.4, 0.3])
    assert log_probs[:, 0, 1].exp().tolist() == pytest.approx([0.3 / 0.6, 0.2 / 0.6, 0.4, 0.3 / 0.6])


def test_banning_touches_its_own_row_only() -> None:
    assert choose(RowSampling(banned=(3,)), RowSampling(), RowSampling(banned=(3, 2)))[0] == [[2], [3], [1]]


def test_forcing_beats_banning() -> None:
    assert choose(RowSampling(forced=(3,), banned=(3,)), steps=2)[0] == [[3, 2]]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [({"top_k": 1}, {3}), ({"top_k": 2}, {2, 3}), ({"top_p": 0.4}, {3}), ({"top_p": 0.41}, {2, 3}),
     ({"top_p": 0.75}, {1, 2, 3}), ({"top_p": 1e-9}, {3}), ({"top_p": 0.75, "top_k": 2}, {2, 3})],
)  # fmt: skip
def test_truncation_keeps_the_smallest_set_and_the_policys_log_probability(
    truncation: dict[str, Any], kept: set[int]
) -> None:
    rows = [RowSampling(temperature=1.0, seed=seed, **truncation) for seed in range(100)]
    tokens, log_probs = choose(*rows)
    assert {token for (token,) in tokens} == kept
    expected = [math.log(PROBABILITIES[token]) for (token,) in tokens]
    assert log_probs[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_frequencies_follow_the_distribution() -> None:
    tokens, _ = choose(*[RowSampling(temperature=1.0, seed=seed) for seed in range(2000)])
    drawn = [token for (token,) in tokens]
    # Standard error sqrt(.4 * .6 / 2000) = .011; four of them.
    for token, probability in enumerate(PROBABILITIES):
        assert drawn.count(token) / 2000 == pytest.approx(probability, abs=0.045)


@given(st.lists(st.integers(0, 2**96), min_size=1, max_size=6, unique=True))
def test_seed_decides_whatever_the_batch(seeds: list[int]) -> None:
    rows = [RowSampling(temperature=1.3, seed=seed) for seed in seeds]
    together, _ = choose(*rows, steps=8)
    alone = [choose(row, steps=8)[0][0] for row in rows]
    assert together == alone


@given(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.01),
    st.integers(0, 1000),
)
def test_impossible_tokens_are_never_drawn(weights: list[float], seed: int) -> None:
    (row,), _ = choose(RowSampling(temperature=1.0, seed=seed), steps=4, probabilities=weights)
    assert all(weights[token] > 0 for token in row)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="the rule is"):
        RowSampling(**wrong)


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
