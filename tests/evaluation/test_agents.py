from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, InputError, JudgeUnavailableError
from metis_agent.evaluation.agents import Estimate, evaluate, share_right
from metis_agent.types import Question, Trajectory
from tests.hdpo.reference import trajectory


def run(question: str, answer: str = "yes", *, kind: str = "", **fields: object) -> Trajectory:
    asked = Question(id=question, text="?", answer="yes", kind=kind)
    return trajectory(answer, question=asked, **fields)  # type: ignore[arg-type]


def test_by_hand() -> None:
    # known: a, b (direct right in all runs). necessary: d, e (direct never, forced tool at least half).
    # c is in between; f fails either way.
    direct = {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.0, "e": 0.0, "f": 0.0}
    tool = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 0.5, "f": 0.0}
    runs = [
        run("a", seconds=1.0),
        run("b", T=3, seconds=2.0),
        run("c", T=1, seconds=3.0),
        run("d", T=2, seconds=4.0),
        run("e", "no", seconds=5.0),
        run("f", "no", seconds=9.0),
    ]
    result = evaluate(runs, direct_right=direct, tool_right=tool)
    overall = result.overall
    assert overall.accuracy.value == pytest.approx(4 / 6)
    assert overall.tool_rate.value == pytest.approx(3 / 6)
    assert overall.calls_per_question.value == pytest.approx((3 + 1 + 2) / 6)
    assert overall.seconds_per_question.value == pytest.approx(24 / 6)
    assert (overall.redundant_rate.value, overall.redundant_rate.questions) == (0.5, 2)  # b of a, b
    assert (overall.necessary_recall.value, overall.necessary_recall.questions) == (0.5, 2)  # d of d, e
    assert (result.questions, result.trajectories, result.failed, result.unjudged) == (6, 6, 0, 0)


def test_questions_weigh_the_same_however_often_they_were_asked() -> None:
    # Question a: 1 of 4 right, a call in 2 of 4. Question b: right, no call.
    runs = [run("a"), run("a", "no", T=1), run("a", "no", T=3), run("a", "no"), run("b")]
    overall = evaluate(runs, direct_right={"a": 1.0}).overall
    assert overall.accuracy.value == pytest.approx((1 / 4 + 1) / 2)
    assert overall.tool_rate.value == pytest.approx((2 / 4 + 0) / 2)
    assert overall.calls_per_question.value == pytest.approx((4 / 4 + 0) / 2)
    assert overall.redundant_rate.value == pytest.approx(2 / 4)


def test_only_executed_calls_count() -> None:
    overall = evaluate([run("a", statuses=["blocked", "repeated"])], direct_right={"a": 1.0}).overall
    assert overall.tool_rate.value == overall.calls_per_question.value == overall.redundant_rate.value == 0


def test_thresholds() -> None:
    runs = [run("a", T=1), run("b")]
    direct, tool = {"a": 0.75, "b": 0.25}, {"b": 0.4}
    strict = evaluate(runs, direct_right=direct, tool_right=tool).overall
    assert strict.redundant_rate.questions == strict.necessary_recall.questions == 0
    assert strict.redundant_rate == Estimate(value=None, low=None, high=None, questions=0)
    loose = evaluate(runs, direct_right=direct, tool_right=tool, known_at=0.75, failed_at=0.25, helped_at=0.4).overall
    assert (loose.redundant_rate.value, loose.necessary_recall.value) == (1.0, 0.0)


def test_the_agents_own_calls_do_not_show_what_was_necessary() -> None:
    assert evaluate([run("a", T=1)], direct_right={"a": 0.0}).overall.necessary_recall.value is None


def test_what_is_not_known_of_a_question_is_not_assumed() -> None:
    overall = evaluate([run("a", T=1)], direct_right={}, tool_right={"a": 1.0}).overall
    assert overall.redundant_rate.value is overall.necessary_recall.value is None


def test_failed_and_unjudged_runs_are_counted_and_never_scored_wrong() -> None:
    def judge(question: Question, answer: str) -> bool | None:
        if answer == "down":
            raise JudgeUnavailableError("no answer from the judge")
        return answer == "yes"

    runs = [
        run("a"),
        run("a", "", status="failed", T=9),
        run("b", "down", T=2),
        run("c", "", status="failed"),
    ]
    result = evaluate(runs, direct_right={}, verify=judge)
    assert (result.questions, result.trajectories, result.failed, result.unjudged) == (2, 2, 2, 1)
    assert (result.overall.accuracy.value, result.overall.accuracy.questions) == (1.0, 1)
    # What was called is a fact also where nobody can judge the answer.
    assert (result.overall.tool_rate.value, result.overall.tool_rate.questions) == (0.5, 2)


def test_kinds_are_reported_apart() -> None:
    runs = [run("a", kind="sum"), run("b", "no", kind="fact"), run("c", kind="fact")]
    result = evaluate(runs, direct_right={})
    assert list(result.kinds) == ["fact", "sum"]
    assert (result.kinds["fact"].accuracy.value, result.kinds["fact"].accuracy.questions) == (0.5, 2)
    assert result.kinds["sum"].accuracy.value == 1.0


def test_share_right_by_hand() -> None:
    runs = [
        run("a", branch="direct"),
        run("a", "no", branch="direct"),
        run("a", branch="direct", T=1),  # Called a tool all the same: says nothing of the direct branch.
        run("a", branch="tool"),  # And this one called none.
        run("b", branch="tool", T=1),
        run("c", status="failed"),
    ]
    assert share_right(runs) == {"a": 0.5, "b": 1.0}


def test_interval_against_the_normal_approximation() -> None:
    # 400 questions, accuracy 0.8: standard error sqrt(0.8 * 0.2 / 400) = 0.02, so 0.8 +- 1.96 * 0.02.
    runs = [run(str(i), "yes" if i % 5 else "no") for i in range(400)]
    accuracy = evaluate(runs, direct_right={}).overall.accuracy
    assert accuracy.value == pytest.approx(0.8)
    assert accuracy.low == pytest.approx(0.8 - 0.0392, abs=0.006)
    assert accuracy.high == pytest.approx(0.8 + 0.0392, abs=0.006)


def test_interval_of_a_subset_resamples_all_questions() -> None:
    # 100 of 400 questions are known, a quarter of them with a call: error near
    # sqrt(0.25 * 0.75 / 100) = 0.0433.
    runs = [run(str(i), T=int(i % 16 == 0)) for i in range(400)]
    redundant = evaluate(runs, direct_right={str(i): 1.0 for i in range(0, 400, 4)}).overall.redundant_rate
    assert (redundant.value, redundant.questions) == (0.25, 100)
    assert redundant.high is not None
    assert redundant.low is not None
    assert (redundant.high - redundant.low) / 2 == pytest.approx(1.96 * 0.0433, rel=0.12)


def test_same_seed_same_interval() -> None:
    runs = [run(str(i), "yes" if i % 3 else "no") for i in range(50)]
    first, again, other = (evaluate(runs, direct_right={}, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.overall.accuracy != other.overall.accuracy


def test_to_dict_is_json() -> None:
    written = json.loads(json.dumps(evaluate([run("a", kind="sum")], direct_right={}).to_dict(), allow_nan=False))
    assert written["overall"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "questions": 1}
    assert written["overall"]["necessary_recall"]["value"] is None
    assert written["kinds"]["sum"]["tool_rate"]["value"] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known_at": 0.5, "failed_at": 0.5}, r"failed_at=0\.5, known_at=0\.5"),
        ({"known_at": 1.5}, r"known_at=1\.5"),
        ({"helped_at": 0.0}, r"helped_at=0\.0"),
        ({"resamples": 0}, "resamples=0"),
        ({"confidence": 1.0}, r"confidence=1\.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        evaluate([run("a")], direct_right={}, **options)  # type: ignore[arg-type]


def test_nothing_to_evaluate() -> None:
    with pytest.raises(InputError, match="None of 1 trajectories finished"):
        evaluate([run("a", status="failed")], direct_right={})


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0])),
        min_size=1,
    )
)
def test_values_lie_in_their_intervals_and_kinds_average_to_the_whole(
    rows: list[tuple[int, bool, int, float]],
) -> None:
    runs = [run(str(q), "yes" if right else "no", T=T, kind=str(q % 2)) for q, right, T, _ in rows]
    direct = {str(q): share for q, _, _, share in rows}
    result = evaluate(runs, direct_right=direct, tool_right=direct, resamples=200, confidence=0.999)
    for estimate in vars(result.overall).values():
        if estimate.value is not None:
            assert estimate.low <= estimate.value + 1e-9
            assert estimate.value - 1e-9 <= estimate.high
    for name in ("accuracy", "tool_rate", "calls_per_question"):
        parts = [getattr(metrics, name) for metrics in result.kinds.values()]
        whole = np.average([part.value for part in parts], weights=[part.questions for part in parts])
        assert getattr(result.overall, name).value == pytest.approx(whole)
