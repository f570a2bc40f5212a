import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_agent.audit.accounting import AuditedCall, AuditedTurn
from metis_agent.audit.frontier import best, caps, oracle, replay, replayable, self_report

READ, ACT = AuditedCall(tool="look"), AuditedCall(tool="book", effect="acts")


def turn(name: str, verdicts: str, *rounds: tuple[AuditedCall, ...], conversation: str = "") -> AuditedTurn:
    known = tuple({"1": True, "0": False, "?": None}[one] for one in verdicts)
    rounds = rounds or ((READ,),) * (len(known) - 1)
    return AuditedTurn(id=name, rounds=rounds, verdicts=known, conversation=conversation)


# Three runs: right at once, right after one call, right after two of three and astray at the end.
RUNS = replayable([turn("a", "111"), turn("b", "011"), turn("c", "0010")])


def test_runs_are_replayed_exactly() -> None:
    # After one round each: a right, b right, c wrong; 3 of the 2 + 2 + 3 calls.
    point = replay(RUNS, np.array([1, 1, 1]), rule="cap")
    assert point.right.value == pytest.approx(2 / 3)
    assert point.calls.value == pytest.approx(3 / 7)


def test_the_oracle_stops_where_it_is_first_right() -> None:
    point = oracle(RUNS)
    # 0 + 1 + 2 calls, and all right: c is better off than it was.
    assert (point.right.value, point.calls.value) == (1.0, pytest.approx(3 / 7))
    lost = oracle(replayable([turn("d", "000")]))
    assert (lost.right.value, lost.calls.value) == (0.0, 0.0)


def test_caps_by_hand() -> None:
    points = caps(RUNS)
    assert [point.setting for point in points] == [0, 1, 2, 3]
    assert [point.right.value for point in points] == pytest.approx([1 / 3, 2 / 3, 1.0, 2 / 3])
    assert [point.calls.value for point in points] == pytest.approx([0, 3 / 7, 6 / 7, 1.0])
    assert best(points, points[-1], tolerance=0.0).setting == 1
    assert best(points, points[-1], tolerance=0.5).setting == 0


def test_a_rule_never_stops_before_an_acting_call() -> None:
    (run,) = replayable([turn("a", "1?11", (READ,), (ACT,), (READ,))])
    # Only the last stretch can be cut: the call before the act stays, whatever the cap.
    assert run.first == 2
    assert oracle([run]).calls.value == pytest.approx(1 / 2)
    assert caps([run])[0].calls.value == pytest.approx(1 / 2)


def test_a_run_with_a_missing_verdict_is_not_replayed() -> None:
    assert replayable([turn("a", "1?1")]) == []
    assert len(replayable([turn("a", "?1", (ACT,))])) == 1  # the missing one is before the last stretch


def test_asking_the_model_whether_it_is_done() -> None:
    assert self_report(RUNS, {}) is None
    # It says done at once for a and c, never for b.
    point = self_report(RUNS, {("a", 0): True, ("c", 0): True, ("b", 0): False, ("b", 1): None})
    assert point is not None
    assert (point.right.value, point.calls.value) == (pytest.approx(2 / 3), pytest.approx(2 / 7))


@settings(max_examples=30)
@given(st.lists(st.text("10", min_size=1, max_size=6), min_size=1, max_size=8))
def test_no_rule_betters_the_oracle(runs: list[str]) -> None:
    found = replayable([turn(str(number), verdicts) for number, verdicts in enumerate(runs)])
    above = oracle(found)
    for point in caps(found):
        if point.right.value == above.right.value and point.calls.value is not None:
            assert point.calls.value >= (above.calls.value or 0.0) - 1e-12
        assert (point.right.value or 0.0) <= (above.right.value or 0.0) + 1e-12
