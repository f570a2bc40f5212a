from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.advantages import (
    Objective,
    advantages,
    branch_weight,
    gdpo_advantages,
    group_advantage,
    hdpo_advantages,
)
from metis_agent.hdpo.exploration import BranchCounts
from metis_agent.hdpo.rewards import Scores

from . import reference


def scores_of(
    right: Sequence[Sequence[float]],
    T: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[bool]] | None = None,
) -> Scores:
    r_ans, counts = np.array(right, dtype=np.float64), np.array(T)
    out = np.zeros(r_ans.shape, dtype=bool) if excluded is None else np.array(excluded)
    return Scores(
        r_ans=np.where(out, np.nan, r_ans),
        r_fmt=np.where(out, np.nan, 1.0),
        T=counts,
        cost=counts.astype(np.float64),
        excluded=out,
    )


def counts_of(*rows: tuple[float, float, float, float]) -> BranchCounts:
    """Rows of (direct right, direct n, tool right, tool n)."""
    k_D, n_D, k_T, n_T = np.array(rows, dtype=np.float64).T
    return BranchCounts(direct_right=k_D, direct_n=n_D, tool_right=k_T, tool_n=n_T)


@st.composite
def groups(draw: st.DrawFn, rollouts: int = 16) -> Scores:
    """One to four groups of one size, with any mix of right, wrong and excluded."""
    P, G = draw(st.integers(1, 4)), draw(st.integers(1, rollouts))
    cell = st.tuples(st.booleans(), st.integers(0, 6), st.sampled_from([False, False, False, True]))
    rows = draw(st.lists(st.lists(cell, min_size=G, max_size=G), min_size=P, max_size=P))
    right, T, excluded = ([[entry[i] for entry in row] for row in rows] for i in range(3))
    return scores_of(right, T, excluded)


# --- by hand ------------------------------------------------------------------------------------------------


def test_accuracy_channel_by_hand() -> None:
    # r = 1, 1, 0, 0: mean 1/2, squared deviations 4 * 1/4 = 1.
    # Sample deviation sqrt(1/3) = 0.57735: +-0.5 / 0.57735 = +-0.86603. Population: sqrt(1/4): +-1.
    r = torch.tensor([[1.0, 1, 0, 0]])
    everyone = torch.ones(1, 4, dtype=torch.bool)
    A = group_advantage(r, everyone, eps=0.0)
    torch.testing.assert_close(A, torch.tensor([[0.86603, 0.86603, -0.86603, -0.86603]]), atol=1e-5, rtol=0)
    A = group_advantage(r, everyone, eps=0.0, ddof=0)
    torch.testing.assert_close(A, torch.tensor([[1.0, 1, -1, -1]]))
    # eps is added to the deviation: 0.5 / (0.5 + 0.5).
    A = group_advantage(r, everyone, eps=0.5, ddof=0)
    torch.testing.assert_close(A, torch.tensor([[0.5, 0.5, -0.5, -0.5]]))


def test_tool_channel_by_hand() -> None:
    # Right with T = 0, 1, 1 and wrong with T = 0: Q = the first three, r_tool = 1, 1/2, 1/2.
    # mean 2/3, deviations 1/3, -1/6, -1/6; sum of squares 1/9 + 2/36 = 1/6, sample variance 1/12.
    # 1/3 / sqrt(1/12) = 2/sqrt(3) = 1.15470, -1/6 / sqrt(1/12) = -0.57735.
    channels = advantages(Objective(eps=0.0), scores_of([[1, 1, 1, 0]], [[0, 1, 1, 0]]))
    torch.testing.assert_close(channels.tool, torch.tensor([[1.15470, -0.57735, -0.57735, 0]]), atol=1e-5, rtol=0)
    # r_acc = 1, 1, 1, 0.1: mean 0.775, deviations 0.225 (three) and -0.675; squares 0.151875 + 0.455625 =
    # 0.6075, variance 0.2025, deviation 0.45: 0.5, 0.5, 0.5, -1.5.
    torch.testing.assert_close(channels.acc, torch.tensor([[0.5, 0.5, 0.5, -1.5]]))
    assert channels.qualifying.tolist() == [[True, True, True, False]]
    assert channels.rho.tolist() == [0.75]
    assert channels.weight.tolist() == [1.0]


def test_excluded_rollout_leaves_the_others_as_if_it_were_not_there() -> None:
    with_one = advantages(Objective(), scores_of([[1, 1, 0, 1]], [[0, 1, 2, 5]], [[False, False, False, True]]))
    without = advantages(Objective(), scores_of([[1, 1, 0]], [[0, 1, 2]]))
    for channel in ("acc", "tool"):
        torch.testing.assert_close(getattr(with_one, channel)[:, :3], getattr(without, channel))
        assert getattr(with_one, channel)[0, 3] == 0
    # Its place in the group remains in the denominator of rho.
    assert with_one.rho.tolist() == [0.5]


@pytest.mark.parametrize(
    ("right", "T", "acc_is_zero"),
    [
        ([[0, 0, 0]], [[0, 1, 2]], True),  # Q is empty.
        ([[1, 0, 0]], [[0, 1, 2]], False),  # Q has one member.
        ([[1]], [[3]], True),  # A group of one.
        ([[1, 1, 1]], [[2, 2, 2]], True),  # Nothing differs.
    ],
)
def test_no_signal_is_exactly_zero(right: list[list[int]], T: list[list[int]], acc_is_zero: bool) -> None:
    channels = advantages(Objective(), scores_of(right, T))
    assert (channels.tool == 0).all()
    assert channels.rho.tolist() == [0.0]
    assert bool((channels.acc == 0).all()) is acc_is_zero


def test_all_excluded_is_zero_and_finite() -> None:
    for name in ("hdpo", "grpo", "coupled", "gdpo"):
        channels = advantages(Objective(name=name), scores_of([[1, 0]], [[0, 1]], [[True, True]]))
        assert channels.acc.tolist() == channels.tool.tolist() == [[0.0, 0.0]]


# --- mistakes of the reference implementation ---------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 4, 5, 6, 9, 10, 12])
@pytest.mark.parametrize("size", range(2, 17))
def test_equal_tool_counts_give_exactly_zero(T: int, size: int) -> None:
    """Rounding of 1/3, 1/5, 1/6 in float32 leaves advantages up to 0.056 there, that pass a `!= 0` mask."""
    r_tool = torch.full((1, size), 1 / (T + 1), dtype=torch.float32)
    right, none = torch.ones(1, size, dtype=torch.bool), torch.zeros(1, size, dtype=torch.bool)
    channels = hdpo_advantages(r_tool, r_tool, right, none)
    assert (channels.tool == 0).all()
    assert (channels.acc == 0).all()
    assert channels.rho.tolist() == [0.0]


def test_rounding_is_a_danger_at_all() -> None:
    """The plain formula does give non-zero advantages to equal rewards: the tests above can fail."""
    worst = 0.0
    for size in range(2, 17):
        r = torch.full((size,), 1 / 3)
        worst = max(worst, float(((r - r.sum() / size) / (r.std(correction=0) + 1e-6)).abs().max()))
    assert worst > 0


def test_sums_of_costs_in_another_order_are_equal() -> None:
    cost = torch.tensor([[0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]], dtype=torch.float64)
    assert cost[0, 0] != cost[0, 1]
    right = torch.ones(1, 2, dtype=torch.bool)
    r_tool = 1 / (1 + cost)
    assert (hdpo_advantages(r_tool, r_tool, right, ~right).tool == 0).all()


def test_qualifying_is_the_correct_mask_whatever_the_rewards_and_counts() -> None:
    """There: three definitions, one of them "correct and used tools"; here the mask, T = 0 included."""
    r_tool = torch.tensor([[1.0, 0.5, 0.9, 0.9]])  # Two wrong rollouts with a reward above 0.
    correct = torch.tensor([[True, True, False, False]])
    channels = hdpo_advantages(r_tool, r_tool, correct, torch.zeros_like(correct))
    assert channels.qualifying.tolist() == correct.tolist()
    assert channels.tool[0, 0] > 0 > channels.tool[0, 1]
    assert channels.tool[0, 2:].tolist() == [0, 0]
    # And a right answer at a price so high that r_tool rounds to nothing still qualifies.
    dear = hdpo_advantages(r_tool, torch.tensor([[1.0, 0, 0, 0]]), correct, torch.zeros_like(correct))
    assert dear.qualifying.tolist() == correct.tolist()
    assert dear.tool[0, 1] < 0


# --- against the NumPy reference ----------------------------------------------------------------------------


def test_thousands_of_random_groups_equal_the_reference() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        P, G = 40, int(rng.integers(1, 17))
        right, excluded = rng.random((P, G)) < rng.random((P, 1)), rng.random((P, G)) < 0.15
        T = rng.integers(0, rng.integers(1, 8), (P, G))
        scores = scores_of(right.tolist(), T.tolist(), excluded.tolist())
        r_acc, r_tool = 0.1 + 0.9 * right, right / (T + 1.0)
        hdpo, coupled, gdpo = (
            advantages(Objective(name=name, w_tool=0.3, alpha=0.4), scores) for name in ("hdpo", "coupled", "gdpo")
        )
        expected = {
            "acc": (hdpo.acc, reference.grpo(r_acc, excluded)),
            "tool": (hdpo.tool, reference.tool_channel(T, right, excluded)),
            "coupled": (coupled.acc, reference.grpo(r_acc + 0.4 * r_tool, excluded)),
            "gdpo": (gdpo.acc, reference.gdpo(r_acc, r_tool, excluded, w_tool=0.3)),
        }
        for name, (ours, theirs) in expected.items():
            np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6, rtol=1e-6, err_msg=name)


def trl_advantages(rewards: Tensor, weights: list[float], G: int, aggregation: str) -> Tensor:
    """What TRL 1.16 does in `GRPOTrainer._generate_and_score_completions`, with its own `nanstd`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    weight = torch.tensor(weights, dtype=rewards.dtype)
    unscorable = rewards.isnan().all(1)
    if aggregation == "sum_then_normalize":
        total = (rewards * weight).nansum(1)
        total[unscorable] = torch.nan
        mean = total.view(-1, G).nanmean(1).repeat_interleave(G)
        std = nanstd(total.view(-1, G), dim=1).repeat_interleave(G)
        return torch.nan_to_num((total - mean) / (std + 1e-4), nan=0.0)
    grouped = rewards.view(-1, G, len(weights))
    z = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    total = (z.view(-1, len(weights)) * weight).nansum(1)
    total[unscorable] = torch.nan
    return torch.nan_to_num((total - total.nanmean()) / (nanstd(total) + 1e-4), nan=0.0)


def test_without_the_tool_channel_it_is_the_grpo_of_trl() -> None:
    rng = np.random.default_rng(1)
    scores = scores_of((rng.random((50, 8)) < 0.5).tolist(), rng.integers(0, 4, (50, 8)).tolist(), None)
    theirs = trl_advantages(torch.tensor(scores.r_acc).reshape(-1, 1), [1.0], 8, "sum_then_normalize")
    ours = advantages(Objective(name="grpo"), scores)
    torch.testing.assert_close(ours.acc.flatten(), theirs.float(), atol=1e-6, rtol=1e-5)
    assert (ours.tool == 0).all()


def test_gdpo_is_trl_normalize_then_sum() -> None:
    rng = np.random.default_rng(2)
    excluded = rng.random((50, 8)) < 0.1
    scores = scores_of((rng.random((50, 8)) < 0.5).tolist(), rng.integers(0, 4, (50, 8)).tolist(), excluded.tolist())
    rewards = torch.tensor(np.stack([scores.r_acc, scores.r_tool], axis=-1)).reshape(-1, 2)
    theirs = trl_advantages(rewards, [1.0, 0.15], 8, "normalize_then_sum")
    ours = advantages(Objective(name="gdpo", w_tool=0.15), scores)
    torch.testing.assert_close(ours.acc.flatten(), theirs.float(), atol=1e-5, rtol=1e-5)
    assert (ours.tool == 0).all()


def test_gdpo_lacks_the_condition_on_correctness_that_hdpo_adds() -> None:
    # Two right with T = 1, two wrong with T = 0. HDPO: equal counts in Q, no tool signal. GDPO: r_tool is
    # 1/2, 1/2, 0, 0, a second reward for being right.
    scores = scores_of([[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 0, 0], [0, 1, 2, 0]])
    assert (advantages(Objective(), scores).tool[0] == 0).all()
    r_acc, r_tool = torch.tensor(scores.r_acc), torch.tensor(scores.r_tool)
    none = torch.zeros(2, 4, dtype=torch.bool)
    alone = gdpo_advantages(r_acc, r_tool, none, w_tool=0.0)
    both = gdpo_advantages(r_acc, r_tool, none, w_tool=1.0)
    assert not torch.allclose(alone, both, atol=1e-2)


# --- properties ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(groups(), st.randoms(use_true_random=False))
def test_the_order_of_rollouts_does_not_matter(scores: Scores, random: object) -> None:
    order = list(range(scores.excluded.shape[1]))
    random.shuffle(order)  # type: ignore[attr-defined]
    names = ("r_ans", "r_fmt", "T", "cost", "excluded")
    shuffled = Scores(**{name: getattr(scores, name)[:, order] for name in names})
    for objective in ("hdpo", "grpo", "coupled", "gdpo"):
        before, after = (advantages(Objective(name=objective), each) for each in (scores, shuffled))
        torch.testing.assert_close(before.acc[:, order], after.acc)
        torch.testing.assert_close(before.tool[:, order], after.tool)
        torch.testing.assert_close(before.rho, after.rho)


@settings(deadline=None)
@given(groups())
def test_channels_are_centred_bounded_and_zero_outside(scores: Scores) -> None:
    channels = advantages(Objective(), scores)
    G = scores.excluded.shape[1]
    for A in (channels.acc, channels.tool):
        assert A.isfinite().all()
        torch.testing.assert_close(A.sum(1), torch.zeros(len(A)), atol=1e-4, rtol=0)
        # The sample z-score of one among n is at most (n - 1) / sqrt(n).
        assert A.abs().max() <= (G - 1) / math.sqrt(G) + 1e-4
    assert (channels.acc[torch.tensor(scores.excluded)] == 0).all()
    assert (channels.tool[~channels.qualifying] == 0).all()
    assert torch.equal(channels.rho > 0, (channels.tool != 0).any(1))


@settings(deadline=None)
@given(groups(), st.floats(0.01, 100), st.floats(-10, 10))
def test_advantages_forget_scale_and_offset(scores: Scores, scale: float, offset: float) -> None:
    included = ~torch.tensor(scores.excluded)
    r = torch.tensor(scores.r_acc)
    torch.testing.assert_close(
        group_advantage(scale * r + offset, included, eps=0.0),
        group_advantage(r, included, eps=0.0),
        atol=1e-6,
        rtol=1e-6,
    )


@settings(deadline=None)
@given(groups())
def test_fewer_calls_never_have_the_lower_tool_advantage(scores: Scores) -> None:
    channels = advantages(Objective(), scores)
    for T, A, Q in zip(scores.T, channels.tool, channels.qualifying, strict=True):
        members = sorted((int(T[i]), -float(A[i])) for i in range(len(T)) if Q[i])
        assert [-a for _, a in members] == sorted((-a for _, a in members), reverse=True)


@settings(deadline=None)
@given(groups())
def test_the_objectives_agree_where_the_tool_reward_has_no_weight(scores: Scores) -> None:
    grpo = advantages(Objective(name="grpo"), scores).acc
    torch.testing.assert_close(advantages(Objective(name="hdpo"), scores).acc, grpo)
    torch.testing.assert_close(advantages(Objective(name="coupled", alpha=0.0), scores).acc, grpo)


# --- the branch weight --------------------------------------------------------------------------------------


def test_branch_weight_by_symmetry_and_at_the_ends() -> None:
    # Equal evidence, no margin: Pr = 1/2 and c = 0. A margin of 1: always. One branch missing: 0.
    even, all_or_nothing = (3, 4, 3, 4), (4, 4, 0, 4)
    c = branch_weight(counts_of(even, all_or_nothing, (0, 4, 4, 4), (0, 0, 4, 4), (4, 4, 0, 0)), margin=0.0)
    assert c[0] == pytest.approx(0.0, abs=1e-6)
    assert c[1] > 0.99
    assert c[2:].tolist() == [0, 0, 0]
    assert branch_weight(counts_of(even), margin=1.0).tolist() == pytest.approx([1.0])


def test_branch_weight_equals_the_reference_quadrature() -> None:
    rng = np.random.default_rng(3)
    rows = [(0, 1, 1, 1), (1, 1, 1, 1), (4, 4, 4, 4), (0, 4, 0, 4), (200, 400, 210, 400)]
    for _ in range(15):
        n_D, n_T = rng.integers(1, 17, 2)
        rows.append((int(rng.integers(0, n_D + 1)), int(n_D), int(rng.integers(0, n_T + 1)), int(n_T)))
    for margin in (0.0, 0.1, 0.35):
        ours = branch_weight(counts_of(*rows), margin=margin)
        theirs = [max(0.0, 2 * reference.probability_direct_does(*row, margin) - 1) for row in rows]
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-5)


def test_branch_weight_equals_sampling() -> None:
    rng = np.random.default_rng(4)
    p_D, p_T = rng.beta(3.5, 1.5, 400_000), rng.beta(3.5, 1.5, 400_000)
    sampled = 2 * np.mean(p_D >= p_T - 0.1) - 1
    assert branch_weight(counts_of((3, 4, 3, 4))).item() == pytest.approx(sampled, abs=5e-3)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_branch_weight_grows_with_the_direct_branch_and_falls_with_the_other(
    n_D: int, n_T: int, data: st.DataObject
) -> None:
    k_D, k_T = data.draw(st.integers(0, n_D - 1)), data.draw(st.integers(0, n_T - 1))
    base, better_direct, better_tool = branch_weight(
        counts_of((k_D, n_D, k_T, n_T), (k_D + 1, n_D, k_T, n_T), (k_D, n_D, k_T + 1, n_T))
    ).tolist()
    assert better_tool <= base <= better_direct
    assert 0 <= base <= 1


def test_branch_weight_multiplies_the_tool_channel_only() -> None:
    scores = scores_of([[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 1, 1], [1, 1, 2, 2]])
    plain, weighted = advantages(Objective(), scores), advantages(Objective(branch_weight=True), scores)
    expected = branch_weight(counts_of((1, 1, 2, 3), (0, 0, 4, 4)))
    torch.testing.assert_close(weighted.weight, expected.float())
    assert weighted.weight[1] == 0  # No direct rollout to go by.
    torch.testing.assert_close(weighted.tool, plain.tool * weighted.weight[:, None])
    torch.testing.assert_close(weighted.acc, plain.acc)


def test_branch_weight_takes_evidence_from_elsewhere() -> None:
    scores = scores_of([[1, 1, 1]], [[1, 1, 2]])
    pooled = counts_of((95, 100, 95, 100))
    assert advantages(Objective(branch_weight=True), scores, pooled).weight[0] > 0.9
    with pytest.raises(InputError, match="2 questions and scores for 1"):
        advantages(Objective(branch_weight=True), scores, counts_of((1, 1, 1, 1), (1, 1, 1, 1)))


# --- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "ppo"}, "name='ppo'"),
        ({"w_tool": -0.1}, r"w_tool=-0\.1"),
        ({"eps": math.nan}, "eps=nan"),
        ({"ddof": 2}, "ddof=2"),
        ({"name": "grpo", "branch_weight": True}, "branch_weight=True"),
    ],
)
def test_objectives_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Objective(**fields)  # type: ignore[arg-type]


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"\(4,\)"):
        group_advantage(torch.ones(4), torch.ones(4, dtype=torch.bool))
