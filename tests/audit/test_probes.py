import asyncio
from typing import ClassVar

import pytest
from langchain_core.messages import AIMessage, SystemMessage

from metis_agent.audit.accounting import ModelPrice, Prices
from metis_agent.audit.probes import DONE, ProbePoint, Prober, Probing, TokenBucket
from metis_agent.audit.turns import ToolEffects, survey
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.sqlite import DiskCache
from tests.audit.recorded import SYSTEM, book, look, run
from tests.fakes import ScriptedChatModel, call, calling, model

EFFECTS = ToolEffects(reads=["look"], acts=["book"])
PRICES = Prices(models={"m": ModelPrice(input=1, output=1)})
FAST = Probing(concurrency=1, backoff=0.0)


def points(*records, ask="answer"):
    return [ProbePoint(turn=turn, state=k, ask=ask) for turn in survey(records, EFFECTS).sample for k in turn.to_probe]


def prober(chat, cache=None, probing=FAST, prices=PRICES, name="m"):
    return Prober(chat, name=name, cache=DiskCache(None) if cache is None else cache, probing=probing, prices=prices)


def ask(it, found):
    return asyncio.run(it.ask(found))


def test_the_model_reads_what_the_run_had_read_and_no_reading_tool_is_offered():
    chat = model("no idea", "It is 7.")
    found = ask(prober(chat), points(run("a", "How many?", look(result="7"), look(), history=[SYSTEM])))
    assert {name: probe.text for name, probe in found.items()} == {
        ("a", 0, "answer"): "no idea", ("a", 1, "answer"): "It is 7.",
    }  # fmt: skip
    first, second = chat.asked
    assert [message.type for message in first.messages] == ["system", "human"]
    assert first.tools == ()
    # Where the history holds calls the definition has to stand there; it may not be called.
    assert [message.type for message in second.messages] == ["system", "human", "ai", "tool"]
    assert second.tool_choice == "none"


def test_a_model_that_must_be_kept_from_calls_is_kept_from_them_at_once():
    class Eager(ScriptedChatModel):
        offers_tools_when_direct: ClassVar[bool] = True

    chat = Eager(script=["7"])
    ask(prober(chat), points(run("a", "q", look())))
    assert (chat.asked[0].tools, chat.asked[0].tool_choice) == (("look",), "none")


def test_acting_tools_are_offered_and_what_would_have_been_called_is_kept():
    chat = model(calling(call("book", seat="12A"), call("look", id="2", query="y")))
    records = [run("a", "Book me a seat.", look(), book())]
    (probe,) = ask(prober(chat), points(*records)).values()
    # Reading calls are not its to make here, and nothing was run.
    assert probe.calls == ({"name": "book", "args": {"seat": "12A"}},)
    assert not probe.refused
    assert chat.asked[0].tool_choice is None
    assert len(chat.asked[0].tools) == 1


def test_a_model_that_neither_answers_nor_acts_is_counted():
    it = prober(model(calling(call("look"))))
    (probe,) = ask(it, points(run("a", "q", look()))).values()
    assert probe.refused
    assert it.counts["refused"] == 1


def test_what_was_paid_for_is_never_asked_again(tmp_path):
    record = run("a", "q", look(), look())
    with DiskCache(tmp_path / "probes.sqlite") as cache:
        ask(prober(model("one", "two"), cache), points(record))
    later = model("three")
    with DiskCache(tmp_path / "probes.sqlite") as cache:
        it = prober(later, cache)
        assert [it.estimate(points(record)).probes, it.estimate(points(record)).cached] == [0, 2]
        found = ask(it, points(record))
    assert [probe.text for probe in found.values()] == ["one", "two"]
    assert (later.asked, it.counts["cached"], it.spent) == ([], 2, 0.0)
    # Another model, or another instruction, is another question.
    assert ask(prober(later, cache=DiskCache(None)), points(record))
    assert later.asked


def test_a_kill_loses_nothing_that_was_paid_for(tmp_path):
    record = run("a", "q", look(), look(), look())
    with DiskCache(tmp_path / "p.sqlite") as cache, pytest.raises(KeyboardInterrupt):
        ask(prober(model("one", "two", KeyboardInterrupt()), cache), points(record))
    with DiskCache(tmp_path / "p.sqlite") as cache:
        chat = model("three")
        found = ask(prober(chat, cache), points(record))
    assert [probe.text for probe in found.values()] == ["one", "two", "three"]
    assert len(chat.asked) == 1


def test_an_outage_is_tried_again_and_then_missing_not_wrong():
    it = prober(model(ConnectionError("down"), ConnectionError("down"), "up"))
    assert next(iter(ask(it, points(run("a", "q", look()))).values())).text == "up"
    gone = prober(model(ConnectionError("down")))
    assert ask(gone, points(run("a", "q", look()))) == {}
    assert gone.counts["ConnectionError"] == 1


def test_a_request_that_is_refused_is_not_repeated():
    class TooLong(Exception):
        status_code = 400

    chat = model(TooLong("context"))
    ask(prober(chat), points(run("a", "q", look())))
    assert len(chat.asked) == 1


def test_where_nothing_works_it_stops():
    records = [run(str(number), "q", look()) for number in range(30)]
    with pytest.raises(InfrastructureError, match=r"10 probes of 'm' failed.*ConnectionError"):
        ask(prober(model(ConnectionError("down"))), points(*records))


def test_the_estimate_is_what_the_runs_had_read():
    # Two states that read 1,000 tokens each; answers of 100. $1 a million: 2 x 1,100 tokens.
    record = run("a", "q", look(), look(), usage={"input_tokens": 1000, "output_tokens": 100})
    found = prober(model()).estimate(points(record))
    assert (found.probes, found.read, found.written) == (2, 2000, 200)
    assert found.dollars == pytest.approx(0.0022)
    assert prober(model(), name="mine").estimate(points(record)).dollars is None


def test_a_budget_is_never_overspent():
    usage = {"input_tokens": 100_000, "output_tokens": 0, "total_tokens": 100_000}
    chat = model(AIMessage("x", usage_metadata=usage))
    records = [run(str(number), "q", look(), usage=usage) for number in range(10)]
    # A probe costs ten cents: three fit into 35.
    it = prober(chat, probing=Probing(concurrency=4, budget=0.35))
    assert len(ask(it, points(*records))) == 3
    assert it.spent == pytest.approx(0.3)
    assert it.counts["over budget"] == 7
    with pytest.raises(ConfigurationError, match="price of 'mine' is unknown"):
        prober(chat, probing=Probing(budget=1.0), name="mine")


def test_the_baseline_asks_whether_the_model_could_answer():
    chat = model("Yes.", "no, I need more", "perhaps")
    found = ask(prober(chat), points(run("a", "q", look(), look(), look()), ask="done"))
    assert [probe.says_yes for probe in found.values()] == [True, False, None]
    assert chat.asked[0].messages[-1].text == DONE


def test_a_system_prompt_and_an_instruction_are_added_where_they_are_given():
    chat = model("x")
    probing = Probing(concurrency=1, system_prompt="Be kind.", instruction="Answer now.")
    ask(prober(chat, probing=probing), points(run("a", "q", look()), run("b", "q", look(), history=[SYSTEM])))
    for asked in chat.asked:
        assert isinstance(asked.messages[0], SystemMessage)
        assert asked.messages[-1].text == "Answer now."
    assert {asked.messages[0].text for asked in chat.asked} == {"Be kind.", "Be brief."}


def test_a_token_bucket_lets_so_many_a_minute_pass():
    now, slept = 0.0, []

    async def sleep(seconds):
        nonlocal now
        slept.append(seconds)
        now += seconds

    async def take(times):
        bucket = TokenBucket(120, clock=lambda: now, sleep=sleep)
        for _ in range(times):
            await bucket.take()

    asyncio.run(take(61))
    assert now == pytest.approx(30.0)  # one at once, then one each half second


@pytest.mark.parametrize("fields", [{"concurrency": 0}, {"rate": 0}, {"budget": -1}, {"seconds": 0}])
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ConfigurationError):
        Probing(**fields)
