"""Recorded runs forked at their steps, and the table of decision points that their forks make."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage, message_to_dict

from metis_agent.errors import InputError
from metis_agent.rollouts.branches import FORK, branch_of, branch_taken, seed_of
from metis_agent.rollouts.points import PointPool, forks_of
from metis_agent.rollouts.recorded import OutcomePool
from metis_agent.types import GateDecision, Question, ToolOutcome, Trajectory

OFFERED = ("search", "send")


def run_of(name: str, *tools: str, answer: str = "yes", **fields: Any) -> Trajectory:
    """A free run with one call in each round; what a call brings is its number."""
    question = Question(id=name, text=f"Question {name}?", answer="yes")
    messages: list[BaseMessage] = [HumanMessage(question.text)]
    outcomes = []
    for k, tool in enumerate(tools):
        messages.append(AIMessage("", tool_calls=[{"name": tool, "args": {}, "id": f"{k}"}]))
        messages.append(ToolMessage(f"result {k}", tool_call_id=f"{k}", name=tool))
        outcomes.append(ToolOutcome(call_id=f"{k}", tool=tool, arguments={}, status="ok", cost=0.5 + k))
    messages.append(AIMessage(answer))
    decisions = (GateDecision(allowed=OFFERED),) * (len(tools) + 1)
    return Trajectory(
        id=f"a/{name}/free/0", question=question, answer=answer, outcomes=tuple(outcomes), decisions=decisions,
        messages=tuple(map(message_to_dict, messages)), **{"metadata": {"model": "m"}, **fields},
    )  # fmt: skip


def forked(run: Trajectory, *answers: str, acting: tuple[str, ...] = ()) -> list[Trajectory]:
    """The recorded forks of a run, each with its answer."""
    return [
        Trajectory(
            id=fork.id, question=run.question, branch="direct", answer=answer, decisions=(GateDecision(allowed=()),),
            messages=tuple(map(message_to_dict, [*fork.begun, AIMessage(answer)])),
            metadata={"model": "m", **fork.metadata},
        )
        for fork, answer in zip(forks_of(run, acting=acting), answers, strict=True)
    ]  # fmt: skip


def test_a_run_is_forked_before_each_of_its_rounds() -> None:
    run = run_of("q", "search", "search")
    first, second = forks_of(run, seed=7)
    assert [it.type for it in first.begun] == ["human"]
    assert [it.type for it in second.begun] == ["human", "ai", "tool"]
    assert (first.id, second.id) == ("a/q/free/0@0", "a/q/free/0@1")
    assert first.seed == second.seed == seed_of(run.id, 7)
    assert second.metadata[FORK] == {
        "run": run.id, "step": 1, "first": 0, "rounds": 2, "answer": "yes", "calls": 1, "cost": 1.5,
        "tools": ["search", "send"],
    }  # fmt: skip
    assert forks_of(run_of("q")) == []
    assert forks_of(run_of("q", "search", status="failed")) == []
    assert forks_of(run_of("q", "search", branch="tool")) == []


def test_no_run_is_cut_short_before_it_acts() -> None:
    run = run_of("q", "search", "send", "search", "search")
    assert [it.metadata[FORK]["step"] for it in forks_of(run, acting=["send"])] == [2, 3]
    assert forks_of(run_of("q", "search", "send"), acting=["send"]) == []


def test_what_stopping_and_going_on_gave() -> None:
    run = run_of("q", "search", "send", "search")
    pool = PointPool().extend([run, *forked(run, "no", "no", "yes")])
    table = pool.table()
    assert table.actions == ("direct", "search", "send")
    assert table.correct.tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert table.cost.tolist() == [[0, 3, 3], [0, 2, 2], [0, 1, 1]]
    assert table.observations == ("", "tool: search: result 0", "tool: search: result 0\ntool: send: result 1")
    assert {*table.runs} == {run.id}
    priced = PointPool(use_cost=True).extend(forked(run, "no", "no", "yes")).table()
    assert priced.cost[:, 1].tolist() == [4.5, 4.0, 2.5]
    # Where it has acted the points begin after that.
    acted = PointPool().extend(forked(run, "yes", acting=("send",))).table()
    assert (acted.correct.tolist(), acted.steps.tolist()) == ([[1, 1, 1]], [2])


def test_a_run_counts_with_all_of_its_steps_or_not_at_all() -> None:
    whole, part = run_of("a", "search"), run_of("b", "search", "search")
    pool = PointPool().extend([*forked(whole, "no"), *forked(part, "no", "yes")[1:]])
    table = pool.table()
    assert {*table.runs} == {whole.id}
    assert table.dropped == {"run without all of its steps": 1}
    with pytest.raises(InputError, match="no decision points"):
        PointPool().extend(forked(part, "no", "yes")[1:]).table()


def test_a_fork_is_a_direct_run_only_before_the_first_call() -> None:
    run = run_of("a", "search", "search")
    first, second = forked(run, "no", "yes")
    assert branch_taken(first) == ("direct", "")
    assert branch_taken(second) == ("", "answered after calls")
    assert (branch_of(first), branch_of(second)) == ("direct", "tool")
    table = OutcomePool().extend([run, first, second]).table()
    assert table.correct.tolist() == [[0.0, 1.0]]


def test_other_tools_and_other_models_are_refused() -> None:
    run, other = run_of("a", "search"), run_of("b", "search")
    stranger = forked(other, "no")[0]
    stranger.metadata[FORK]["tools"].append("browse")
    with pytest.raises(InputError, match="other tools"):
        PointPool().extend([*forked(run, "no"), stranger])
    with pytest.raises(InputError, match="name all of them"):
        PointPool(tools=["search"]).extend(forked(run, "no")).table()
    with pytest.raises(InputError, match="runs of the models"):
        PointPool().extend([*forked(run, "no"), run_of("c", metadata={"model": "n", FORK: {}})])
    assert PointPool(tools=["send", "search"]).extend(forked(run, "no")).table().tools == ("send", "search")


def test_verdicts_that_look_like_the_verifiers_fault_are_refused() -> None:
    run = run_of("a", *["search"] * 20, answer="no")
    with pytest.raises(InputError, match="judged wrong"):
        PointPool().extend(forked(run, *["no"] * 20)).table()


@cache
def many() -> list[list[Trajectory]]:
    runs = [run_of(f"{n}", *["search"] * (1 + n % 3)) for n in range(9)]
    return [forked(run, *["no"] * len(run.outcomes)) for run in runs]


@given(st.permutations(range(9)), st.integers(0, 9), st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_the_sample_does_not_depend_on_the_order_or_on_shards(order: list[int], cut: int, room: int) -> None:
    forks = many()

    def pooled(places: Any) -> PointPool:
        return PointPool(max_points=room).extend(fork for place in places for fork in forks[place])

    whole = pooled(range(9))
    assert len(whole) <= room
    parts = pooled(order[:cut]).merge(pooled(order[cut:]))
    assert len(parts) == len(whole)
    if len(whole):
        one, other = whole.table(), parts.table()
        assert one.runs == other.runs
        assert np.array_equal(one.correct, other.correct)
