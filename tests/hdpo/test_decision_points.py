"""When to stop: learnt by regression from recorded runs, replayed exactly, and the deployed gate as replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.evaluation.calibration import Promise, choose_threshold
from metis_agent.evaluation.gates import evaluate_stopping, followed, replay, score_table
from metis_agent.gates.policy import PolicyGate
from metis_agent.hdpo.export import set_threshold, write_artefact
from metis_agent.hdpo.gate_trainer import _step_saving, train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable, read_outcomes
from metis_agent.types import GateRequest, ToolSpec
from tests.worlds.almanac.two_hops import Run, decision_points, records

TOOLS = (ToolSpec(name="text_search"),)


def table_of(verdicts: list[list[int]], costs: list[list[float]] | None = None) -> OutcomeTable:
    """Decision points of runs with these a_0 .. a_K; each round costs 1 where nothing else is said."""
    costs = costs or [[1.0] * (len(run) - 1) for run in verdicts]
    points = [(i, k) for i, run in enumerate(verdicts) for k in range(len(run) - 1)]
    return OutcomeTable(
        questions=tuple(f"question {i}" for i, _ in points), actions=("direct", "search"),
        correct=np.array([[verdicts[i][k], verdicts[i][-1]] for i, k in points], dtype=float),
        cost=np.array([[0.0, sum(costs[i][k:])] for i, k in points]),
        seconds=np.full((len(points), 2), np.nan), runs=tuple(f"run {i}" for i, _ in points),
        observations=tuple("\n".join(f"tool: search: {n}" for n in range(k)) for _, k in points),
    )  # fmt: skip


# --- the table -------------------------------------------------------------------------------------------------------


def test_decision_points_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text(
        '{"run": "a", "question": "Q", "observations": [], "stop_correct": 0, "on_correct": 1, "on_cost": 2}\n'
        '{"run": "a", "question": "Q", "observations": [{"tool": "search", "content": "x\\ny", "failed": true}], '
        '"stop_correct": 1, "on_correct": 1, "on_cost": 1}\n'
    )
    table = read_outcomes(path, direct="stop", tools={"search": "on", "python": "on"})
    assert table.runs == ("a", "a")
    assert table.observations == ("", "failed: search: x y")
    assert table.steps.tolist() == [0, 1]
    assert table.correct.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert len({*table.keys}) == 2
    assert len({*table.homes}) == 1
    with pytest.raises(ConfigurationError, match="branch of its own"):
        read_outcomes(path, direct="on", tools={"search": "on"})


def test_states_of_a_run_are_neighbours() -> None:
    table = table_of([[0, 0, 1], [0, 1, 1]])
    with pytest.raises(InputError, match="states in order"):
        table.take([0, 2, 1, 3])
    with pytest.raises(InputError, match="states in order"):
        OutcomeTable(**{**table.__dict__, "observations": ()})


# --- replay ----------------------------------------------------------------------------------------------------------


def test_replay_by_hand() -> None:
    # Enough after 0, 1 and never; the last run loses what it had.
    points = table_of([[1, 1, 1], [0, 1, 1], [0, 0, 0], [1, 0, 0]])
    full = replay(points, np.ones(8, dtype=bool))
    assert full.cost.tolist() == [2, 2, 2, 2]
    assert full.correct.tolist() == full.full.tolist() == [1, 1, 0, 0]
    assert full.enough[[0, 1, 3]].tolist() == [0, 1, 0]
    assert np.isnan(full.enough[2])
    figures = full.figures()
    # Redundant: 2 + 1 + 2 of 4 turns; in vain 2 of 4; the one call that was needed was made.
    assert (figures["redundant"], figures["in_vain"], figures["necessary"]) == (1.25, 0.5, 1.0)
    stopped = replay(points, np.array([0, 1, 1, 0, 0, 0, 0, 0], dtype=bool))
    assert stopped.cost.tolist() == [0, 1, 0, 0]
    assert stopped.correct.tolist() == [1, 1, 0, 1]


def test_what_going_on_gives_follows_the_rule() -> None:
    points = table_of([[0, 1, 0]], [[1.0, 3.0]])
    # At s_1 the rule stops: going on at s_0 then is right, and costs the first round alone.
    under = followed(points, np.array([False, True]))
    assert under.correct.tolist() == [[0, 1], [1, 0]]
    assert under.cost.tolist() == [[0, 1], [0, 3]]
    # r(0) - r(1) at s_0, r(1) - r(4) at s_1.
    assert _step_saving(points, under.cost[:, 1]) == pytest.approx([1 - 1 / 2, 1 / 2 - 1 / 5])


@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=5), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_following_a_rule_is_replaying_it(verdicts: list[list[int]], seed: int) -> None:
    points = table_of(verdicts)
    stop = np.random.default_rng(seed).random(len(points)) < 0.5
    under, done = followed(points, stop), replay(points, ~stop)
    first = [row for row in range(len(points)) if points.steps[row] == 0]
    right = np.where(stop[first], under.correct[first, 0], under.correct[first, 1])
    assert right.tolist() == done.correct.tolist()
    assert np.where(stop[first], 0.0, under.cost[first, 1]).tolist() == done.cost.tolist()


# --- the bound -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), beta=st.floats(0.0, 0.5), rounds=st.integers(1, 6), error=st.floats(0, 0.1))
@settings(max_examples=100, deadline=None)
def test_at_most_beta_a_run_is_lost_against_always_going_on(seed: int, beta: float, rounds: int, error: float) -> None:
    # A tree of states: at each one of three follows at random. q_go is what the rule itself goes on to.
    rng = np.random.default_rng(seed)
    right = [rng.random(3**k) for k in range(rounds + 1)]
    cost = rng.random(rounds + 1).cumsum() - 0.0
    r = 1 / (1 + np.r_[0.0, cost])
    always = value = right[rounds]
    economy, decisions = np.full(3**rounds, r[rounds]), np.zeros(3**rounds)
    for k in range(rounds - 1, -1, -1):
        on, saved, later = (it.reshape(-1, 3).mean(axis=1) for it in (value, economy, decisions))
        seen = on - right[k] + rng.uniform(-2 * error, 2 * error, len(on))
        stop = seen <= beta * (r[k] - saved)
        value, economy = np.where(stop, right[k], on), np.where(stop, r[k], saved)
        decisions = 1 + np.where(stop, 0.0, later)
        always = always.reshape(-1, 3).mean(axis=1)
        # A run loses at most beta, and what wrong estimates cost: twice e for each decision taken.
        assert (always - value).max() <= beta * (r[k] - r[rounds]) + (2 * error * decisions).max() + 1e-9


def test_the_oracle_makes_no_call_that_wins_nothing() -> None:
    # Right from the start, after one call, at the end alone, never.
    points = table_of([[1, 1, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    oracle = evaluate_stopping(np.zeros(len(points)), points, 0.0, resamples=10)["oracle"]
    assert (oracle["accuracy"], oracle["cost"]) == (0.75, (0 + 1 + 2 + 0) / 4)


# --- a gate ----------------------------------------------------------------------------------------------------------


def ask(gate: PolicyGate, run: Run) -> int:
    """The calls that a deployed gate lets a run make."""
    messages: list[BaseMessage] = [HumanMessage(run.question)]
    for k, (tool, content, _) in enumerate(run.brought):
        decision = gate.decide(GateRequest(messages=messages, tools=TOOLS))
        assert not decision.required
        assert decision.reason.startswith("enough" if decision.direct else "going on")
        if decision.direct:
            return k
        messages += [
            AIMessage("", tool_calls=[{"name": tool, "args": {}, "id": str(k)}]),
            ToolMessage(content, tool_call_id=str(k), name=tool),
        ]
    return len(run.brought)


def calibrated(folder: Path, seed: int, *, train: int, limit: float) -> PolicyGate:
    """A gate for the two-hop almanac, its threshold set for a promise on other runs."""
    runs = records("train", 2 * train, seed)
    table = decision_points(runs[:train])
    write_artefact(train_gate(table, GateTraining(folds=2, strengths=(3.0,))), folder, table=table, metrics={})
    points = decision_points(runs[train:])
    scored = score_table(PolicyGate(folder, unfamiliar="gate"), points)
    promise = Promise(kind="accuracy_loss", limit=limit)
    threshold = choose_threshold(scored.probabilities, points.correct, points.cost, promise, points=points)
    assert "turns" in str(threshold.note()["chosen"])
    set_threshold(folder, threshold.note())
    return PolicyGate(folder, unfamiliar="gate")


def check(gate: PolicyGate, runs: list[Run]) -> dict[str, float]:
    """Figures of the deployed gate, which are those of the replay to the question."""
    points = decision_points(runs)
    scored = score_table(gate, points)
    calls = [ask(gate, run) for run in runs]
    assert calls == replay(points, scored.need > gate.threshold).cost.tolist()
    figures = evaluate_stopping(scored.need, points, gate.threshold, resamples=50)
    assert figures["cost"] == pytest.approx(np.mean(calls))
    assert figures["cost"] < figures["as_recorded"]["cost"]
    needed = sum(run.needed for run in runs)
    return {
        "redundant": sum(max(0, made - run.needed) for made, run in zip(calls, runs, strict=True)) / len(runs),
        "necessary": sum(min(made, run.needed) for made, run in zip(calls, runs, strict=True)) / needed,
        "accuracy": figures["accuracy"] - figures["as_recorded"]["accuracy"],
        "before": figures["as_recorded"]["redundant"],
    }


def test_a_gate_stops_when_it_is_enough(tmp_path: Path) -> None:
    gate = calibrated(tmp_path / "gate", 0, train=400, limit=0.05)
    assert gate.every_step
    figures = check(gate, records("test", 150, 0))
    assert figures["before"] > 1
    assert figures["redundant"] <= 0.1
    assert figures["necessary"] >= 0.97


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_hardly_a_call_is_redundant_and_none_is_missed(seed: int, tmp_path: Path) -> None:
    figures = check(calibrated(tmp_path / "gate", seed, train=1000, limit=0.02), records("test", 600, seed))
    assert figures["before"] > 1
    assert figures["redundant"] <= 0.05
    assert figures["necessary"] >= 0.97
    assert figures["accuracy"] >= -0.02  # as promised


def test_calls_go_first_to_where_each_brings_most(tmp_path: Path) -> None:
    # One call makes a near question right more often than not, three a far one nearly always.
    near, far = [[0, 1]] * 14 + [[1, 1]] * 6, [[0, 0, 0, 1]] * 20
    table = table_of(near * 3 + far * 3)
    kind = ["near" if row < 60 else "far" for row in range(120)]
    names = [f"{kind[int(run.split()[1])]} {run}" for run in table.runs]
    table = OutcomeTable(**{**table.__dict__, "questions": tuple(names)})
    gate = train_gate(table, GateTraining(folds=2, strengths=(1.0,)))
    first, is_near = table.steps == 0, np.array([name.startswith("near") for name in names])
    benefit = gate.contrast.benefit(gate.accuracy)[:, 0]
    assert benefit[first & is_near].max() < benefit[first & ~is_near].min()
    assert gate.probabilities[first & is_near].min() > gate.probabilities[first & ~is_near].max()
    assert gate.to_come is not None
    assert gate.to_come[first & is_near].mean() == pytest.approx(1, abs=0.3)
    assert gate.to_come[first & ~is_near].mean() == pytest.approx(3, abs=0.3)
    # Where to stop is what it is without.
    plain = gate.contrast.probabilities(gate.accuracy, gate.steps)
    assert ((plain > 0.5) == (gate.probabilities > 0.5)).all()
    write_artefact(gate, tmp_path / "gate", table=table, metrics={})
    deployed = score_table(PolicyGate(tmp_path / "gate"), table).probabilities
    assert deployed == pytest.approx(gate.score(np.arange(len(table)))[1], abs=1e-4)


def test_calls_are_not_promised_by_turn() -> None:
    points = table_of([[0, 1, 1]] * 5)
    with pytest.raises(ConfigurationError, match="promise their cost"):
        choose_threshold(
            np.full((10, 1), 0.5), points.correct, points.cost, Promise(kind="calls", limit=0.5), points=points
        )
