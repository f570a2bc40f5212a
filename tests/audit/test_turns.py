from dataclasses import replace

import pytest
from langchain_core.messages import AIMessage, message_to_dict

from metis_agent.audit.accounting import ModelPrice, Prices, uses
from metis_agent.audit.turns import ToolEffects, matched, survey
from metis_agent.errors import ConfigurationError
from tests.audit.recorded import book, look, run

EFFECTS = ToolEffects(reads=["look"], acts=["book"])
USAGE = {"input_tokens": 1000, "output_tokens": 100}


def one(record, effects=EFFECTS):
    (turn,) = survey([record], effects).sample
    return turn


def test_states_before_reading_rounds_are_probed_and_others_are_not():
    turn = one(run("a", "q", look(), book(), look(), [*look(), *book()]))
    assert turn.rounds == (("look",), ("book",), ("look",), ("look", "book"))
    assert turn.to_probe == (0, 2)


def test_what_a_round_saves_is_its_tool_and_the_model_call_that_read_it():
    # s0 asks (1000 in, 100 out), s1 answers: without the round, s0 answers. Saved: the 1000 that s1 read and the 100
    # in which s0 asked; the answer is written either way. $1 and $10 a million: 0.001 + 0.001, and the tool's 0.25.
    turn = one(run("a", "q", look(), usage=USAGE, seconds=2.0, cost=0.25, metadata={"model": "m"}))
    ((amount,),) = turn.amounts(Prices(models={"m": ModelPrice(input=1, output=10)}))
    assert amount.dollars == pytest.approx(0.252)
    assert (amount.seconds, amount.tokens, amount.unpriced, amount.guessed) == (4.0, 1100, 0, 0)


def test_calls_made_at_once_share_the_model_call():
    turn = one(run("a", "q", [*look(), *look("y")], usage=USAGE, seconds=2.0, metadata={"model": "m"}))
    ((first, second),) = turn.amounts(Prices(models={"m": ModelPrice(input=1, output=10)}))
    assert first == second
    assert (first.dollars, first.seconds, first.tokens) == (pytest.approx(0.001), 2.0, 550)


def test_an_unknown_price_is_counted_in_tokens_and_unrecorded_tokens_are_guessed():
    ((amount,),) = one(run("a", "q", look(), usage=USAGE, metadata={"model": "mine"})).amounts(Prices())
    assert (amount.dollars, amount.tokens, amount.unpriced) == (0.0, 1100, 1100)
    ((guess,),) = one(run("a", "x" * 400, look("y" * 40))).amounts(Prices())
    assert guess.guessed == guess.tokens > 100  # a quarter of the 400 characters, and the call's


@pytest.mark.parametrize(
    ("definition", "effect"),
    [
        ({"type": "function", "function": {"name": "t"}}, "unknown"),
        ({"type": "function", "function": {"name": "t", "metadata": {"read_only": True}}}, "reads"),
        ({"name": "t", "annotations": {"readOnlyHint": True}}, "reads"),
        ({"name": "t", "annotations": {"readOnlyHint": False}}, "acts"),
        ({"name": "other", "annotations": {"readOnlyHint": True}}, "unknown"),
    ],
)
def test_what_a_tool_does_is_said_or_declared_and_never_guessed(definition, effect):
    assert ToolEffects().of("t", [definition]) == effect
    assert ToolEffects(acts=["t"]).of("t", [definition]) == "acts"
    assert ToolEffects(reads=["*"]).of("t", [definition]) == ("reads" if effect == "unknown" else effect)


def test_patterns_stand_for_names_and_a_tool_that_two_fit_acts():
    effects = ToolEffects(reads=["get_*", "cancel_quote"], acts=["cancel_*", "get_and_set"])
    said = {name: effects.of(name) for name in ("get_order", "get_and_set", "cancel_order", "cancel_quote", "forget_x")}
    assert list(said.values()) == ["reads", "acts", "acts", "reads", "unknown"]
    assert ToolEffects(reads=["*", "get_*"], acts=["get_*l"]).of("get_all") == "acts"
    assert matched(effects.acts, "cancel_order", "look") == ["cancel_*"]


def test_a_tool_cannot_be_both():
    with pytest.raises(ConfigurationError, match="'book'"):
        ToolEffects(reads=["book"], acts=["book"])


def test_what_does_not_count_is_counted_with_the_reason():
    asks = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "z"}])
    broken = run("c", "q", look())
    broken = replace(broken, messages=(*broken.messages[:-1], message_to_dict(asks)))
    records = [
        run("a", "q", look()),
        run("b", "q"),
        replace(run("d", "q"), branch="direct"),
        replace(run("e", "q"), status="failed"),
        broken,
        replace(run("f", "q"), messages=({"type": "nonsense", "data": {}},)),
        run("g", "q", [("mystery", {}, "?")]),
    ]
    found = survey(records, EFFECTS)
    assert (found.turns, found.with_calls) == (3, 1)
    assert found.left_out == {"forced": 1, "failed": 1, "no answer": 1, "unreadable messages": 1}
    assert dict(found.calls) == {"reads": 1, "unknown": 1}
    assert found.undeclared == ["mystery"]


def test_the_sample_is_fair_the_same_for_the_same_seed_and_grows():
    records = [run(str(number), "q", look()) for number in range(50)]
    small = [turn.run.id for turn in survey(records, EFFECTS, sample=5, seed=1).sample]
    large = survey(reversed(records), EFFECTS, sample=20, seed=1)
    assert [turn.run.id for turn in large.sample][:5] == small
    assert large.scale == 2.5
    assert [turn.run.id for turn in survey(records, EFFECTS, sample=5, seed=2).sample] != small
    with pytest.raises(ConfigurationError, match="at least one"):
        survey(records, EFFECTS, sample=0)


def test_a_call_that_was_blocked_is_none():
    record = run("a", "q", look())
    blocked = replace(record, outcomes=(replace(record.outcomes[0], status="blocked"),))
    found = survey([blocked], EFFECTS)
    assert (found.turns, found.with_calls, sum(found.calls.values())) == (1, 0, 0)


def test_the_turn_as_the_accounting_reads_it():
    turn = one(run("a", "q", look(), book(), kind="trip", conversation="c"))
    audited = turn.audited([False, None, True], Prices())
    assert uses(audited) == (("necessary",), ("acting",))
    assert (audited.kind, audited.group) == ("trip", "c")
