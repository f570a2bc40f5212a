import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.audit.accounting import Amount, AuditedCall, AuditedTurn, harmful_rounds, stretches, uses
from metis_agent.errors import InputError

READ, ACT, UNKNOWN = (AuditedCall(tool=name, effect=name) for name in ("reads", "acts", "unknown"))


def turn(verdicts: str, *rounds: tuple[AuditedCall, ...]) -> AuditedTurn:
    """A turn by its verdicts, 1, 0 or ?; by default each round is one reading call."""
    known = tuple({"1": True, "0": False, "?": None}[one] for one in verdicts)
    return AuditedTurn(id="t", rounds=rounds or ((READ,),) * (len(known) - 1), verdicts=known)


def words(it: AuditedTurn) -> list[str]:
    return [use for calls in uses(it) for use in calls]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("1", []),  # no call, nothing to say
        ("11", ["redundant"]),  # k* = 0
        ("01", ["necessary"]),  # k* = 1
        ("00", ["lost"]),  # no k*
        ("001", ["necessary", "necessary"]),  # k* = 2
        ("0111", ["necessary", "redundant", "redundant"]),  # k* = 1
        ("1001", ["redundant"] * 3),  # k* = 0, though it went astray afterwards
        ("10", ["redundant"]),  # and did not come back: harmful, and after k* all the same
        ("?1", ["undecided"]),  # k* is 0 or 1
        ("0?1", ["undecided"] * 2),  # k* is 1 or 2
        ("1?1", ["redundant"] * 2),  # k* = 0, whatever the missing one
        ("0?", ["undecided"]),
    ],
)
def test_what_calls_were_for_by_hand(verdicts: str, expected: list[str]) -> None:
    assert words(turn(verdicts)) == expected


def test_calls_of_one_round_share_its_fate() -> None:
    assert uses(turn("011", (READ, READ), (READ,))) == (("necessary", "necessary"), ("redundant",))


def test_an_acting_call_is_never_redundant_and_begins_the_count_anew() -> None:
    # s0 read s1 read s2 act s3 read s4. At s1 the model would have made the act; at s3 the answer is right.
    it = turn("01?11", (READ,), (READ,), (ACT,), (READ,))
    assert list(stretches(it)) == [(0, 2), (3, 4)]
    assert words(it) == ["necessary", "redundant", "acting", "redundant"]


def test_a_run_that_acts_agrees_with_itself() -> None:
    # The verdict that stands at s1, where it acted, is not read.
    assert words(turn("001", (READ,), (ACT,))) == ["necessary", "acting"]
    assert words(turn("0?1", (READ,), (ACT,))) == ["necessary", "acting"]


def test_tools_of_which_nobody_said_what_they_do_are_kept_apart() -> None:
    assert words(turn("11", (UNKNOWN,))) == ["undeclared"]
    assert words(turn("11", (READ, UNKNOWN))) == ["acting", "undeclared"]
    assert words(turn("11", (READ, ACT))) == ["acting", "acting"]


@pytest.mark.parametrize(
    ("verdicts", "harmful"),
    [("10", [True]), ("101", [True, False]), ("0101", [False, True, False]), ("1?0", [False, False]), ("01", [False])],
)
def test_a_harmful_round_takes_away_what_was_right(verdicts: str, harmful: list[bool]) -> None:
    assert list(harmful_rounds(turn(verdicts))) == harmful


def test_an_acting_round_is_not_harmful_however_the_next_verdict_is() -> None:
    assert harmful_rounds(turn("110", (ACT,), (READ,))) == (False, True)


def test_there_is_a_verdict_for_each_state() -> None:
    with pytest.raises(InputError, match="2 rounds of calls and 2 verdicts"):
        AuditedTurn(id="t", rounds=((READ,), (READ,)), verdicts=(True, True))


def test_amounts_add_up() -> None:
    total = Amount(dollars=1.0, seconds=2.0, tokens=3, unpriced=4) + Amount(dollars=0.5, tokens=1)
    assert total == Amount(dollars=1.5, seconds=2.0, tokens=4, unpriced=4)


RUNS = st.lists(
    st.tuples(st.lists(st.sampled_from([READ, ACT, UNKNOWN]), min_size=1, max_size=3), st.sampled_from("10?")),
    max_size=7,
).flatmap(lambda rounds: st.sampled_from("10?").map(lambda last: (rounds, last)))


@given(RUNS)
def test_every_call_has_one_use_and_acting_ones_are_never_counted_away(run: tuple[list, str]) -> None:
    rounds, last = run
    it = turn("".join(verdict for _, verdict in rounds) + last, *(tuple(calls) for calls, _ in rounds))
    labels = uses(it)
    assert [len(of_round) for of_round in labels] == [len(calls) for calls in it.rounds]
    for calls, of_round in zip(it.rounds, labels, strict=True):
        for call, use in zip(calls, of_round, strict=True):
            if call.effect == "acts":
                assert use == "acting"
            if call.effect == "unknown":
                assert use == "undeclared"
    # What was harmful was not needed: it stands after a right answer.
    for harmful, of_round in zip(harmful_rounds(it), labels, strict=True):
        assert not harmful or set(of_round) <= {"redundant", "undecided"}


@given(st.text("10", min_size=1, max_size=9))
def test_redundant_calls_are_what_stopping_at_the_first_right_state_saves(verdicts: str) -> None:
    it = turn(verdicts)
    first = verdicts.find("1")
    saved = len(verdicts) - 1 - first if first >= 0 else 0
    assert words(it).count("redundant") == saved
    assert words(it).count("lost") == (len(verdicts) - 1 if first < 0 else 0)


@given(st.text("10?", min_size=2, max_size=7))
def test_a_missing_verdict_never_changes_what_is_decided(verdicts: str) -> None:
    # Whatever the missing verdicts turn out to be, a label that was given stands.
    given_labels = words(turn(verdicts))
    for fill in ("1", "0"):
        filled = words(turn(verdicts.replace("?", fill)))
        for before, after in zip(given_labels, filled, strict=True):
            assert before in ("undecided", after)
