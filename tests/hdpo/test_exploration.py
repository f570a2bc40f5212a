from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.exploration import BranchCounts, StratifiedGroups, branch_of, count_branches
from metis_agent.hdpo.rewards import score

from .reference import group, trajectory


def test_default_group_of_sixteen() -> None:
    assert StratifiedGroups().branches() == ("direct",) * 4 + ("tool",) * 4 + ("free",) * 8


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_branches_fill_the_group(direct: int, tool: int, free: int) -> None:
    size = direct + tool + free
    if not size:
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
