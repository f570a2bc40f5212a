from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.exploration import (
    BranchCounts,
    LaterDecision,
    StratifiedGroups,
    balance_weights,
    count_branches,
    cut,
    decisions_of,
    later_decisions,
    rollout_weights,
)
from metis_agent.hdpo.rewards import score
from metis_agent.rollouts.branches import branch_of
from metis_agent.types import Branch, ModelCall, Trajectory

from .reference import group, trajectory


def test_default_group_of_sixteen() -> None:
    assert StratifiedGroups().branches() == ("direct",) * 4 + ("tool",) * 4 + ("free",) * 8


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_branches_fill_the_group(direct: int, tool: int, free: int) -> None:
    size = direct + tool + free
    if not size or (direct and not tool):
        return
    branches = StratifiedGroups(size=size, direct=direct, tool=tool).branches()
    assert len(branches) == size
    assert (branches.count("direct"), branches.count("tool")) == (direct, tool)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"size": 0, "direct": 0, "tool": 0}, "size=0"),
        ({"direct": -1}, "direct=-1"),
        ({"tool": -2}, "tool=-2"),
        ({"size": 7}, "direct=4 and tool=4 don't fit in size=7"),
    ],
)
def test_groups_that_cannot_be(counts: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        StratifiedGroups(**counts)


def test_the_branch_taken_is_what_was_executed_and_not_what_was_asked() -> None:
    assert branch_of(trajectory(branch="tool", statuses=["blocked", "repeated"])) == "direct"
    assert branch_of(trajectory(branch="direct", T=1)) == "tool"
    assert branch_of(trajectory(branch="free", statuses=["error"])) == "tool"


def test_counts_by_hand() -> None:
    # Direct: right, wrong. Tool: right, right, and one excluded.
    runs = (
        trajectory("yes"),
        trajectory("no"),
        trajectory(T=1),
        trajectory(T=3),
        trajectory(T=1, status="failed"),
    )
    counts = count_branches(score([group(*runs)]))
    assert (counts.direct_right.tolist(), counts.direct_n.tolist()) == ([1], [2])
    assert (counts.tool_right.tolist(), counts.tool_n.tolist()) == ([2], [2])


def test_counts_that_cannot_be() -> None:
    one, two = np.array([1.0]), np.array([2.0])
    with pytest.raises(InputError, match="right <= n"):
        BranchCounts(direct_right=two, direct_n=one, tool_right=one, tool_n=one)
    with pytest.raises(InputError, match="finite"):
        BranchCounts(direct_right=one, direct_n=one, tool_right=one, tool_n=np.array([np.inf]))
    with pytest.raises(InputError, match=r"all must be \[P\]"):
        BranchCounts(direct_right=one, direct_n=one, tool_right=one, tool_n=np.ones(2))


def test_rollout_weights_worked_by_hand() -> None:
    # G = 16 with 4 forced each way: f = 1/4, free = 1/2. With pi_T = 0.9 a branch that did worse has weight
    #   a call:    0.9 / (0.25 + 0.5 * 0.9) = 0.9 / 0.7 = 9/7
    #   no call:   0.1 / (0.25 + 0.5 * 0.1) = 0.1 / 0.3 = 1/3
    # and the one that did better has weight 1.
    called = np.array([[True, False] * 8])
    calling_is_better, answering_is_better = np.where(called, 1.0, -1.0), np.where(called, -1.0, 1.0)
    for A, expected in ((calling_is_better, [1, 1 / 3] * 8), (answering_is_better, [9 / 7, 1] * 8)):
        weights = rollout_weights(A, called, np.array([0.9]), StratifiedGroups())
        np.testing.assert_allclose(weights, [expected])


def test_rollout_weights_are_one_where_nothing_is_forced_or_nothing_known() -> None:
    called = np.array([[True, False, True, True]])
    A = np.array([[-1.0, 2.0, -1.0, 0.0]])
    free = StratifiedGroups(size=4, direct=0, tool=0)
    np.testing.assert_array_equal(rollout_weights(A, called, np.array([0.2]), free), np.ones((1, 4)))
    some = StratifiedGroups(size=4, direct=1, tool=1)
    np.testing.assert_array_equal(rollout_weights(A, called, np.array([np.nan]), some), np.ones((1, 4)))


@given(
    pi_T=st.floats(0, 1),
    values=st.tuples(st.floats(-5, -0.01), st.floats(-5, -0.01)),
    direct=st.integers(1, 6),
    tool=st.integers(1, 6),
)
def test_without_a_better_branch_the_weights_give_the_policys_own_expectation(
    pi_T: float, values: tuple[float, float], direct: int, tool: int
) -> None:
    """Sum over branches of (share in the group) x (weight) x value = E_pi[value]."""
    groups = StratifiedGroups(size=16, direct=direct, tool=tool)
    called = np.array([[False, True]])
    w_D, w_T = rollout_weights(np.array([values]), called, np.array([pi_T]), groups)[0]
    free = (16 - direct - tool) / 16
    share_D, share_T = direct / 16 + free * (1 - pi_T), tool / 16 + free * pi_T
    expected = (1 - pi_T) * values[0] + pi_T * values[1]
    assert math.isclose(share_D * w_D * values[0] + share_T * w_T * values[1], expected, abs_tol=1e-9)


@given(
    pi_T=st.floats(0.001, 0.999),
    advantages=st.lists(st.floats(-3, 3), min_size=16, max_size=16),
    called=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_a_decision_always_moves_towards_the_branch_that_did_better(
    pi_T: float, advantages: list[float], called: list[bool]
) -> None:
    """d/dz of the surrogate, z the logit of calling: sum_i w_i A_i (1[called_i] - pi_T)."""
    A = np.array([advantages]) - np.mean(advantages)
    calls = np.array([[False] * 4 + [True] * 4 + called])
    weights = rollout_weights(A, calls, np.array([pi_T]), StratifiedGroups())
    gradient = float((weights * A * (calls - pi_T)).sum())
    gain_of_calling = float((A * calls).sum())
    if abs(gain_of_calling) > 1e-6:
        assert gradient * gain_of_calling > 0


@pytest.mark.parametrize("p", [(0.5, 0.5, 0.5), (0.99, 0.9, 0.02), (0.01, 0.3, 0.7)])
def test_with_several_steps_the_weights_give_the_policys_own_expectation(p: tuple[float, float, float]) -> None:
    """Of any value of a path of up to three decisions, each way of starting in its share of the group."""
    groups = StratifiedGroups(size=16, direct=3, tool=6, steps=3)
    value = np.array([0.1, 0.7, 0.3, 1.0])  # of answering after so many calls
    chance = [(1 - p[0]), p[0] * (1 - p[1]), p[0] * p[1] * (1 - p[2]), p[0] * p[1] * p[2]]
    found = 0.0
    for branch, at in zip(groups.branches(), groups.forced_at(), strict=True):
        q = [float(branch == "tool") if step == at else p[step] for step in range(3)]
        drawn = [(1 - q[0]), q[0] * (1 - q[1]), q[0] * q[1] * (1 - q[2]), q[0] * q[1] * q[2]]
        for calls in range(4):
            later = [
                LaterDecision(
                    called=np.array([[calls > step]]), probability=np.array([[p[step]]]),
                    state=np.array([[0 if calls >= step else -1]]),
                )
                for step in (1, 2)
            ]  # fmt: skip
            (weight,) = balance_weights(np.array([[calls > 0]]), np.array([p[0]]), groups, later)[0]
            found += drawn[calls] * weight * value[calls] / 16
    assert math.isclose(found, float(np.dot(chance, value)), rel_tol=1e-9)


def test_later_decisions_are_read_off_those_who_share_a_prompt() -> None:
    groups = StratifiedGroups(size=4, direct=1, tool=2, steps=1)
    assert later_decisions([begun("free", called=True)] * 4, groups, np.array([True])) == []
    groups = StratifiedGroups(size=5, direct=2, tool=2, steps=2)

    def run(branch: Branch, at: int, *prompts: tuple[int, ...], last: bool, opening: int = 7) -> Trajectory:
        p = 0.2 if opening == 7 else 1.0
        calls = [
            ModelCall(
                node="act", step=step, prompt_ids=prompt, completion_ids=(opening if step else 7, 8),
                log_probs=(math.log(p), -1.0),
                tool_calls=({"name": "python"},) if step + 1 < len(prompts) or last else (),
                forced=int(branch == "tool" and step == at),
            )
            for step, prompt in enumerate(prompts)
        ]  # fmt: skip
        return trajectory(branch=branch, calls=tuple(calls))

    runs = [
        run("direct", 0, (1,), last=False),
        run("direct", 1, (1,), (2,), last=False),
        run("tool", 0, (1,), (2,), last=True, opening=9),  # another way to begin a call, so not what is compared
        run("tool", 1, (1,), (2,), last=True),
        run("free", -1, (1,), (2,), last=True),
    ]
    (second,) = later_decisions(runs, groups, np.array([True]))
    assert second.state.tolist() == [[-1, 1, 1, 1, 1]]
    assert second.called.tolist() == [[False, False, True, True, True]]
    np.testing.assert_allclose(second.probability, [[math.nan, 0.2, 0.2, 0.2, 0.2]])
    (untold,) = later_decisions(runs, groups, np.array([False]))
    assert np.isnan(untold.probability).all()
    assert cut([second], groups).tolist() == [[False, True, False, True, False]]


def test_each_branch_needs_a_rollout_for_every_step() -> None:
    assert StratifiedGroups(size=16, direct=3, tool=4, steps=3).forced_at()[:7] == (0, 1, 2, 0, 1, 2, 0)
    for steps in (0, 4):
        with pytest.raises(ConfigurationError, match=f"steps={steps}"):
            StratifiedGroups(size=16, direct=3, tool=4, steps=steps)


def test_forcing_direct_alone_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Force at least one"):
        StratifiedGroups(direct=4, tool=0)


def begun(branch: Branch, *, called: bool, opening: float = 0.5) -> Trajectory:
    """A rollout of one model call; a forced one begins with an opening of that probability."""
    forced = branch == "tool"
    call = ModelCall(
        node="act",
        step=0,
        tool_calls=({"name": "python"},) if called else (),
        log_probs=(math.log(opening), -1.0),
        forced=int(forced),
    )
    return trajectory(branch=branch, calls=(call,))


def test_the_probability_of_a_call_is_that_of_the_forced_opening_where_free_rollouts_agree() -> None:
    groups = StratifiedGroups(size=8, direct=1, tool=1)
    runs = [begun("direct", called=False), begun("tool", called=True, opening=0.5)]
    runs += [begun("free", called=place < 3) for place in range(6)]
    called, probability = decisions_of(runs, groups)
    assert called.tolist() == [[False, True, True, True, True, False, False, False]]
    assert probability.tolist() == pytest.approx([0.5])


@pytest.mark.parametrize(("opening", "calls"), [(1.2e-4, 6), (1.2e-4, 2), (0.999, 1)])
def test_a_probability_that_the_free_rollouts_belie_is_not_guessed(opening: float, calls: int) -> None:
    """A policy that thinks first, say, calls in all of its free runs and never opens as the forced ones do."""
    groups = StratifiedGroups(size=8, direct=1, tool=1)
    runs = [begun("direct", called=False), begun("tool", called=True, opening=opening)]
    runs += [begun("free", called=place < calls) for place in range(6)]
    called, probability = decisions_of(runs, groups)
    assert np.isnan(probability).all()
    np.testing.assert_array_equal(rollout_weights(-np.ones((1, 8)), called, probability, groups), np.ones((1, 8)))


def test_a_forced_call_that_comes_out_malformed_is_a_call() -> None:
    groups = StratifiedGroups(size=4, direct=1, tool=1)
    runs = [begun("direct", called=False), begun("tool", called=False), *[begun("free", called=True)] * 2]
    assert decisions_of(runs, groups)[0].tolist() == [[False, True, True, True]]
