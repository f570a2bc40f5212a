from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import InputError, JudgeUnavailableError, SandboxGoneError
from metis_agent.hdpo.rewards import Scores, accuracy_reward, format_reward, score, tool_reward
from metis_agent.types import ModelCall, Question

from .reference import group, trajectory

NONE = np.zeros((1, 4), dtype=bool)


def test_accuracy_reward_by_hand() -> None:
    # 0.9*1 + 0.1*1,  0.9*1 + 0.1*0,  0.9*0 + 0.1*1,  0
    r_acc = accuracy_reward(np.array([[1.0, 1, 0, 0]]), np.array([[1.0, 0, 1, 0]]), NONE)
    np.testing.assert_allclose(r_acc, [[1.0, 0.9, 0.1, 0.0]])


def test_tool_reward_by_hand() -> None:
    # Right with 0, 1, 3 calls: 1/1, 1/2, 1/4; wrong without a call: 0.
    r_tool = tool_reward(np.array([[0.0, 1, 3, 0]]), np.array([[True, True, True, False]]), NONE)
    np.testing.assert_allclose(r_tool, [[1.0, 0.5, 0.25, 0.0]])


def test_excluded_is_nan_whatever_it_holds() -> None:
    excluded = np.array([[True, False]])
    nan_first = np.array([[np.nan, 1.0]])
    assert np.isnan(accuracy_reward(nan_first, nan_first, excluded)).tolist() == [[True, False]]
    r_tool = tool_reward(np.array([[-1.0, 0.0]]), np.array([[True, True]]), excluded)
    assert np.isnan(r_tool).tolist() == [[True, False]]


def test_format_reward() -> None:
    unreadable = {
        "type": "ai",
        "data": {"content": "", "invalid_tool_calls": [{"name": "python", "args": "{"}]},
    }
    flat = {"type": "ai", "content": "", "invalid_tool_calls": [{"name": "python", "args": "{"}]}
    clean = {"type": "ai", "data": {"content": "yes", "invalid_tool_calls": []}}
    assert format_reward(trajectory("no", T=1, messages=(clean,))) == 1.0
    assert format_reward(trajectory(" \n")) == 0.0
    assert format_reward(trajectory(messages=(clean, unreadable))) == 0.0
    assert format_reward(trajectory(messages=(flat,))) == 0.0
    assert format_reward(trajectory('<tool_call>{"name": "python"}</tool_call>')) == 0.0
    # Readable but unsuccessful is the tools' matter, not the format's.
    assert format_reward(trajectory(statuses=["error", "blocked"])) == 1.0


@pytest.mark.parametrize("call", [{"name": "", "args": {}}, {"args": {}}, {"name": "python", "args": "1 + 1"}])
def test_format_reward_of_a_malformed_call(call: dict[str, object]) -> None:
    assert format_reward(trajectory(calls=(ModelCall(node="gate", step=0, tool_calls=(call,)),))) == 0.0
    good = {"name": "python", "args": {"code": "1"}}
    assert format_reward(trajectory(calls=(ModelCall(node="gate", step=0, tool_calls=(good,)),))) == 1.0


def test_score_by_hand() -> None:
    scores = score([group(trajectory("yes"), trajectory("Yes.", T=2), trajectory("no", T=1), trajectory(""))])
    assert scores.r_ans.tolist() == [[1, 1, 0, 0]]
    assert scores.r_fmt.tolist() == [[1, 1, 1, 0]]
    assert scores.T.tolist() == [[0, 2, 1, 0]]
    assert scores.cost.tolist() == [[0, 2, 1, 0]]
    assert scores.correct.tolist() == [[True, True, False, False]]
    np.testing.assert_allclose(scores.r_acc, [[1, 1, 0.1, 0]])
    np.testing.assert_allclose(scores.r_tool, [[1, 1 / 3, 0, 0]])
    assert not scores.excluded.any()
    assert scores.exclusions == {}


def test_T_counts_executed_calls_from_the_trace() -> None:
    """The reference counts invalid calls and misses a call in the last turn."""
    mixed = trajectory(statuses=["ok", "error", "timeout", "blocked", "repeated"])
    last_turn = trajectory("", statuses=["ok"])  # The run ended on a call, without an answer.
    assert score([group(mixed, last_turn)]).T.tolist() == [[3, 1]]


def test_declared_cost_replaces_the_count() -> None:
    # Two calls of 1.5 each: 1 / (1 + 3).
    scores = score([group(trajectory(T=2, cost=1.5), trajectory())], cost=lambda run: run.cost)
    np.testing.assert_allclose(scores.r_tool, [[0.25, 1.0]])
    assert scores.T.tolist() == [[2, 0]]


@pytest.mark.parametrize("error", [JudgeUnavailableError, SandboxGoneError])
def test_failed_judge_or_tool_server_is_excluded_and_not_scored_zero(error: type[Exception]) -> None:
    """The reference scores them 0, which trains as the model's mistake."""

    def sometimes_down(question: Question, answer: str) -> bool | None:
        if answer == "down":
            raise error("gone")
        return answer == "yes"

    runs = trajectory("yes"), trajectory("down"), trajectory("", status="failed", error="sandbox gone")
    scores = score([group(*runs, trajectory("no"))], sometimes_down)
    assert scores.excluded.tolist() == [[False, True, True, False]]
    assert np.isnan(scores.r_acc).tolist() == scores.excluded.tolist() == np.isnan(scores.r_tool).tolist()
    assert scores.correct.tolist() == [[True, False, False, False]]
    assert scores.exclusions == {"judge unavailable": 1, "failed run": 1}


def test_without_a_reference_answer_rollouts_are_excluded() -> None:
    scores = score([group(trajectory("x", question=Question(id="q", text="?")))])
    assert scores.excluded.all()
    assert scores.exclusions == {"no reference": 1}


def test_groups_must_have_one_size() -> None:
    with pytest.raises(InputError, match=r"sizes \[1, 2\]"):
        score([group(trajectory()), group(trajectory(), trajectory())])
    with pytest.raises(InputError, match="0 groups"):
        score([])


@pytest.mark.parametrize(
    ("name", "value"),
    [("r_ans", 0.5), ("r_ans", np.nan), ("r_fmt", 2.0), ("cost", -1.0), ("cost", np.inf), ("T", -1)],
)
def test_scores_out_of_range_are_refused_unless_excluded(name: str, value: float) -> None:
    fields = dict.fromkeys(("r_ans", "r_fmt", "T", "cost"), np.ones((1, 1))) | {name: np.full((1, 1), value)}
    with pytest.raises(InputError, match=f"{name} has"):
        Scores(**fields, excluded=np.array([[False]]))
    Scores(**fields, excluded=np.array([[True]]))


def test_scores_of_different_shapes_are_refused() -> None:
    one = np.ones((1, 2))
    with pytest.raises(InputError, match=r"\(1, 3\)"):
        Scores(r_ans=one, r_fmt=one, T=np.ones((1, 3)), cost=one, excluded=one == 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=16))
def test_each_call_lowers_the_reward_of_a_right_answer_only(rollouts: list[tuple[bool, int]]) -> None:
    correct, T = np.array([[right for right, _ in rollouts]]), np.array([[count for _, count in rollouts]])
    none = np.zeros_like(correct)
    now, later = tool_reward(T, correct, none), tool_reward(T + 1, correct, none)
    assert (later[correct] < now[correct]).all()
    assert (now[~correct] == 0).all()
