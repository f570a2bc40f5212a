"""What the report says of a store that was worked out by hand, and the same by `evaluation.agents`."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from metis_agent.errors import InputError, StorageError
from metis_agent.evaluation.agents import evaluate, share_right
from metis_agent.report.facts import Facts, ReportInputs, gather
from metis_agent.report.figures import Agent, agent_of, labels
from metis_agent.types import GateDecision, Question, Trajectory
from tests.report.stores import AFTER, BEFORE, PROBES, outcome, run, store, table_of


def agent(runs: tuple[Trajectory, ...]) -> Agent:
    found = agent_of(table_of(runs))
    assert found is not None
    return found


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    return gather(ReportInputs(store=store(tmp_path / "after", AFTER), before=store(tmp_path / "before", BEFORE)))


def test_the_means_are_those_worked_out_by_hand() -> None:
    # Right: q1, q2, q4 of the four that can be judged. Called: q2 and q4 of five. T: 0, 1, 0, 2, 0.
    # Known: q1, q2; called on one. Necessary: q3; not called. Seconds: 1 + T.
    # Tool seconds: .5 a call, cost: .01 a call. The failed run counts nowhere.
    after = agent(AFTER)
    expected = {
        "accuracy": 3 / 4, "tool_rate": 2 / 5, "redundant_rate": 1 / 2, "necessary_recall": 0.0, "calls": 3 / 5,
        "seconds": 8 / 5, "tool_seconds": 1.5 / 5, "cost": 0.03 / 5,
    }  # fmt: skip
    assert {name: after.estimate(name).value for name in expected} == pytest.approx(expected)
    assert {name: after.estimate(name).questions for name in ("accuracy", "redundant_rate", "necessary_recall")} == {
        "accuracy": 4, "redundant_rate": 2, "necessary_recall": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "runs", [AFTER, BEFORE, (*AFTER, run("q1", "5", "python", number=3), run("q4", "9", number=3))]
)
def test_it_agrees_with_the_evaluation(runs: tuple[Trajectory, ...]) -> None:
    free = [each for each in runs if each.branch == "free"]
    measured = evaluate(
        free,
        direct_right=share_right(each for each in runs if each.branch == "direct"),
        tool_right=share_right(each for each in runs if each.branch == "tool"),
    )
    ours = agent(runs)
    for theirs, name in (
        ("accuracy", "accuracy"), ("tool_rate", "tool_rate"), ("redundant_rate", "redundant_rate"),
        ("necessary_recall", "necessary_recall"), ("calls_per_question", "calls"), ("seconds_per_question", "seconds"),
    ):  # fmt: skip
        for kinds, metrics in [(None, measured.overall), *measured.kinds.items()]:
            inside = None if kinds is None else ours.of_kind(frozenset({kinds}))
            found, wanted = ours.estimate(name, inside), getattr(metrics, theirs)
            assert found.questions == wanted.questions
            assert found.value == (pytest.approx(wanted.value) if wanted.value is not None else None)


def test_every_run_has_the_labels_that_fit() -> None:
    marks = labels(table_of(AFTER))
    by_label = {name: [AFTER[row].id for row in np.flatnonzero(mark)] for name, mark in marks.items()}
    free = {name: [id_ for id_ in ids if id_.startswith("free")] for name, ids in by_label.items()}
    assert free == {
        "redundant": ["free/q2/0"], "wrong_direct": ["free/q3/0"], "missed": ["free/q3/0"], "harmful": [],
        "wrong": ["free/q3/0"], "failed": ["free/q1/9"],
    }  # fmt: skip
    marks = labels(table_of(BEFORE))
    assert [BEFORE[row].id for row in np.flatnonzero(marks["harmful"])] == ["free/q2/0"]


def test_changes_are_paired_by_question(facts: Facts) -> None:
    assert facts.compared == "before"
    assert facts.paired
    # T before 1 1 1 1 1, after 0 1 0 2 0: mean of -1 0 -1 1 -1.
    calls = facts.changes["calls"]
    assert (calls.before.value, calls.after.value) == (1.0, pytest.approx(0.6))
    assert calls.difference.value == pytest.approx(-0.4)
    # Right before 1 0 1 1, after 1 1 0 1.
    assert facts.changes["accuracy"].difference.value == pytest.approx(0.0)
    assert facts.changes["accuracy"].difference.questions == 4


def test_without_another_store_it_compares_with_always_calling(tmp_path: Path) -> None:
    facts = gather(ReportInputs(store=store(tmp_path / "after", AFTER)))
    assert facts.compared == "always"
    # Forced calls were recorded of q1 to q4, one each; free runs of these have T = 0 1 0 2.
    assert facts.changes["calls"].difference.questions == 4
    assert facts.changes["calls"].difference.value == pytest.approx(-1 / 4)


def test_two_stores_without_a_question_in_common_are_compared_as_such(tmp_path: Path) -> None:
    other = tuple(run(Question(id=f"o{n}", text="?", answer="1"), "1", "python") for n in range(4))
    facts = gather(ReportInputs(store=store(tmp_path / "a", AFTER), before=store(tmp_path / "b", other)))
    assert not facts.paired
    assert facts.changes["calls"].difference.value == pytest.approx(0.6 - 1.0)
    assert facts.changes["accuracy"].difference.value == pytest.approx(-0.25)


def test_only_forced_runs(tmp_path: Path) -> None:
    facts = gather(ReportInputs(store=store(tmp_path / "a", PROBES)))
    assert facts.after.agent is None
    assert facts.compared == "nothing"
    assert len(facts.archive) == len(PROBES)


def test_tools_are_counted_by_what_became_of_their_calls() -> None:
    odd = replace(
        run("q1", "4"),
        outcomes=(outcome("python"), outcome("python", 1, status="blocked"), outcome("web", 2, status="timeout")),
    )
    table = table_of((*AFTER, odd))
    # Free runs of AFTER: q2 python, q4 text_search and python.
    python, web = table.tool_use["python"], table.tool_use["web"]
    assert (python.runs, python.calls, python.seconds, python.cost) == (3, 3, 1.5, pytest.approx(0.03))
    assert python.statuses == {"ok": 3, "blocked": 1}
    assert (web.calls, web.statuses["timeout"]) == (1, 1)


def test_what_cannot_be_judged_here_is_counted_with_its_reason() -> None:
    asked = Question(id="j", text="Is it good?", answer="yes", verifier="judge")
    table = table_of((run(asked, "yes"), run("q5", "no")))
    assert table.unjudged == {"the verifier 'judge' is not at hand here": 1, "no reference": 1}


def test_time_under_way_counts_overlaps_once() -> None:
    # [0, 2], [1, 3] and [10, 11]; what a record says that no time can be is left out (warnings are errors here).
    times = ((0.0, 2.0), (1.0, 2.0), (10.0, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (math.nan, 1.0), (1e308, 1e308))
    runs = tuple(replace(run("q1", "4"), started_at=start, seconds=took) for start, took in reversed(times))
    assert agent(runs).busy == pytest.approx(4.0)


def test_a_watching_gate(tmp_path: Path) -> None:
    shadow = {"allowed": [], "required": False, "gate": "new", "version": "1"}
    watched = replace(run("q2", "6", "python"), decisions=(GateDecision(allowed=("python",), shadow=shadow),) * 2)
    facts = gather(ReportInputs(store=store(tmp_path / "a", (watched, run("q1", "4"))), decisions=0))
    assert facts.shadow is not None
    assert (facts.shadow.calls, facts.shadow.calls_saved, facts.shadow.turns) == (1, 1, 1)
    assert len(facts.archive) == 0


def test_all_figures_are_json(facts: Facts) -> None:
    found = json.loads(json.dumps(facts.to_dict(), allow_nan=False))
    assert found["stores"][0]["labels"]["redundant"] == 1
    assert found["stores"][0]["tools"]["python"]["redundant_runs"] == 1
    assert found["stores"][0]["failed"] == 1
    assert found["kinds"]["sum"]["calls"]["difference"]["value"] == pytest.approx(-0.5)
    assert found["decisions_shown"] == found["decisions"] == len(AFTER) + len(BEFORE)


def test_an_empty_store_and_none_at_all_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no trajectories"):
        gather(ReportInputs(store=str(tmp_path / "empty")))
    with pytest.raises(StorageError, match="can't be read"):
        gather(ReportInputs(store=str(tmp_path / "nowhere")))


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    url = store(tmp_path / "a", AFTER)
    with next((tmp_path / "a").glob("*.jsonl")).open("a") as file:
        file.write("{this is no run}\n")
    facts = gather(ReportInputs(store=url))
    assert facts.after.bad_lines == 1
    assert asdict(facts.after.agent)["runs"] == 5 if facts.after.agent else False
