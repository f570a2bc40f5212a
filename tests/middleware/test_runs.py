"""Runs as LangChain users run them: async, streamed, checkpointed, recorded, with drafts."""

import asyncio
import itertools
import logging
from types import SimpleNamespace

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ToolErrorMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt

from metis_agent import MetisGateMiddleware, Recorder, TrajectoryStore
from metis_agent.gates import Gate, ModelGate, NeverGate
from metis_agent.rules.budget import Budget
from metis_agent.types import TOKEN_RECORD, GateDecision
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, Verdict, answered, ask, gated, statuses

QUESTION = {"messages": [HumanMessage("q")]}


@pytest.fixture
def store(tmp_path):
    with TrajectoryStore(tmp_path / "runs") as store:
        yield store


def shape(state):
    return [(m.type, str(m.text)) for m in state["messages"]]


async def test_async_runs_are_sync_runs(ran, tools):
    script = [calling(call("look", id="1", query="x"), call("pay", id="2", amount=1)), "ok"]
    sync = ask(gated(model(*script), tools, Only("look")))
    state = await gated(model(*script), tools, Only("look")).ainvoke(QUESTION)
    assert shape(state) == shape(sync)
    assert statuses(state) == statuses(sync) == ["blocked", "ok"]
    assert ran == [("look", "x")] * 2


async def test_runs_side_by_side_keep_their_own_outcomes(tools):
    # The call ids are the same in all of them.
    agent = gated(model(lambda messages: reply_to(messages)), tools, ModelGate())

    def reply_to(messages):
        if messages[-1].type == "tool":
            return "ok"
        return calling(call("look", query=messages[-1].text))

    questions = [{"messages": [HumanMessage(str(number))]} for number in range(20)]
    states = await asyncio.gather(*(agent.ainvoke(question) for question in questions))
    assert [[o.content for o in state["outcomes"]] for state in states] == [[f"found {n}"] for n in range(20)]
    states = agent.batch(questions)
    assert [[o.content for o in state["outcomes"]] for state in states] == [[f"found {n}"] for n in range(20)]


def test_decisions_reach_the_custom_stream(tools):
    agent = gated(model(calling(call("look", query="x")), "ok"), tools, Only("look"))
    events = [event for mode, event in agent.stream(QUESTION, stream_mode=["custom", "updates"]) if mode == "custom"]
    assert [(event["type"], event["allowed"], event["gate"]) for event in events] == [
        ("metis_decision", ("look",), "only")
    ] * 2


@pytest.mark.parametrize("mode", ["values", "updates", "messages", "custom", "debug", "checkpoints", "tasks"])
def test_every_stream_mode_works(tools, mode):
    agent = gated(
        model(calling(call("look", query="x")), "ok"), tools, ModelGate(), agent={"checkpointer": InMemorySaver()}
    )
    events = list(agent.stream(QUESTION, {"configurable": {"thread_id": "t"}}, stream_mode=mode))
    assert events
    if mode == "messages":
        assert [str(m.text) for m, _ in events if isinstance(m, AIMessage | AIMessageChunk)][-1] == "ok"


def test_a_thread_holds_plain_values_only(tools):
    from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

    strict = InMemorySaver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))
    thread = {"configurable": {"thread_id": "t"}}
    agent = gated(model(calling(call("look", query="x")), "ok"), tools, ModelGate(), agent={"checkpointer": strict})
    ask(agent, config=thread)
    values = agent.get_state(thread).values
    assert [d.gate for d in values["decisions"]] == ["ModelGate"] * 2
    assert [o.status for o in values["outcomes"]] == ["ok"]
    kept = strict.get_tuple(thread).checkpoint["channel_values"]
    assert all(isinstance(record, dict) for key in ("decisions", "outcomes") for record in kept[key])


def test_private_notes_stay_out_of_input_and_output(tools):
    agent = gated(model("ok"), tools, ModelGate())
    assert set(ask(agent)) == {"messages", "decisions", "outcomes", "calls"}
    assert "decisions" not in agent.get_input_jsonschema()["properties"]


def test_a_tool_that_interrupts_goes_on_where_it_was(tools):
    @tool
    def confirm(what: str) -> str:
        """Ask a person."""
        return f"{what}: {interrupt('sure?')}"

    both = calling(call("confirm", id="1", what="pay"), call("look", id="2", query="x"))
    agent = gated(model(both, "ok"), [confirm, *tools], ModelGate(), agent={"checkpointer": InMemorySaver()})
    thread = {"configurable": {"thread_id": "t"}}
    assert ask(agent, config=thread)["__interrupt__"]
    state = agent.invoke(Command(resume="yes"), thread)
    assert answered(state) == {"1": "pay: yes", "2": "found x"}
    assert statuses(state) == ["ok", "ok"]


def test_an_interrupted_run_can_be_resumed_by_another_process(tools):
    @tool
    def confirm(what: str) -> str:
        """Ask a person."""
        return f"{what}: {interrupt('sure?')}"

    saver, thread = InMemorySaver(), {"configurable": {"thread_id": "t"}}
    both = calling(call("confirm", id="1", what="pay"), call("look", id="2", query="x"))
    chat = model(both, "ok")
    ask(gated(chat, [confirm, *tools], ModelGate(), agent={"checkpointer": saver}), config=thread)
    # Another middleware object, with a ledger of its own, stands for the other process.
    other = gated(chat, [confirm, *tools], ModelGate(), agent={"checkpointer": saver})
    state = other.invoke(Command(resume="yes"), thread)
    assert sorted((o.tool, o.status, o.content) for o in state["outcomes"]) == [
        ("confirm", "ok", "pay: yes"), ("look", "ok", "found x"),
    ]  # fmt: skip


def test_a_turn_that_has_ended_leaves_nothing_in_the_process(tools, store):
    gate = MetisGateMiddleware(ModelGate(), recorder=Recorder(store))
    script = [calling(call("look", query="x")), ConnectionError("down"), "ok"]
    agent = create_agent(model(*script), tools, middleware=[gate], checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "t"}}
    with pytest.raises(ConnectionError):
        ask(agent, config=thread)
    assert statuses(agent.invoke(None, thread)) == ["ok"]
    assert [run.status for run in store.read()] == ["failed", "finished"]
    kept = [value for value in vars(gate._buffer).values() if isinstance(value, dict)]
    assert kept
    assert not any(kept)


def test_who_goes_back_to_a_place_in_a_turn_that_has_ended_finds_what_ran(ran, tools):
    agent = gated(
        model(calling(call("look", id="1", query="x"), call("pay", id="2", amount=1)), "ok"), tools, ModelGate(),
        agent={"checkpointer": InMemorySaver()},
    )  # fmt: skip
    thread = {"configurable": {"thread_id": "t"}}
    ask(agent, config=thread)
    [before] = [s for s in agent.get_state_history(thread) if s.next == ("model",) and len(s.values["messages"]) == 4]
    state = agent.invoke(None, before.config)
    assert len(ran) == 2
    assert statuses(state) == ["ok", "ok"]


# Records.


def test_a_run_is_a_trajectory(tools, store):
    tools[0].metadata = {"cost": 0.25}
    chat = model(calling(call("look", id="1", query="x"), call("pay", id="2", amount=1)), "It is x.")
    ask(gated(chat, tools, Only("look"), recorder=Recorder(store, metadata={"app": "a"})), "What is it?")
    [trajectory] = store.read()
    assert (trajectory.question.text, trajectory.answer, trajectory.status) == ("What is it?", "It is x.", "finished")
    assert [m["type"] for m in trajectory.messages] == ["human", "ai", "tool", "tool", "ai"]
    assert [d.allowed for d in trajectory.decisions] == [("look",), ("look",)]
    assert sorted((o.tool, o.status) for o in trajectory.outcomes) == [("look", "ok"), ("pay", "blocked")]
    assert (trajectory.tool_calls, trajectory.cost) == (1, 0.25)
    assert [(c.node, c.step, c.text) for c in trajectory.calls] == [("act", 0, ""), ("act", 1, "It is x.")]
    assert trajectory.metadata == {"app": "a"}
    assert trajectory.seconds > 0


async def test_async_runs_are_recorded(tools, store):
    agent = gated(model("ok"), tools, NeverGate(), recorder=Recorder(store))
    await asyncio.gather(*(agent.ainvoke(QUESTION) for _ in range(5)))
    trajectories = list(store.read())
    assert [t.calls[0].node for t in trajectories] == ["answer"] * 5
    assert len({t.id for t in trajectories}) == 5


def test_an_interrupted_run_is_one_trajectory(tools, store):
    @tool
    def confirm(what: str) -> str:
        """Ask a person."""
        return f"{what}: {interrupt('sure?')}"

    agent = gated(
        model(calling(call("confirm", what="pay")), "ok"), [confirm], ModelGate(),
        recorder=Recorder(store), agent={"checkpointer": InMemorySaver()},
    )  # fmt: skip
    thread = {"configurable": {"thread_id": "t"}}
    ask(agent, config=thread)
    assert list(store.read()) == []
    agent.invoke(Command(resume="yes"), thread)
    [trajectory] = store.read()
    assert trajectory.answer == "ok"
    assert [o.content for o in trajectory.outcomes] == ["pay: yes"]


def test_a_model_that_fails_leaves_a_failed_trajectory(tools, store):
    agent = gated(
        model(calling(call("look", query="x")), ConnectionError("down")), tools, ModelGate(), recorder=Recorder(store)
    )
    with pytest.raises(ConnectionError):
        ask(agent)
    [trajectory] = store.read()
    assert (trajectory.status, trajectory.error) == ("failed", "ConnectionError: down")
    assert [o.status for o in trajectory.outcomes] == ["ok"]


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_a_tool_that_raises_ends_the_run_and_leaves_one_failed_trajectory(store, flavour):
    @tool
    def broken(x: int) -> str:
        """Fails."""
        raise ValueError("no disk")

    both = calling(call("broken", id="1", x=1), call("broken", id="2", x=2))
    agent = gated(model(both), [broken], ModelGate(), recorder=Recorder(store))
    with pytest.raises(ValueError, match="no disk"):
        agent.invoke(QUESTION) if flavour == "sync" else asyncio.run(agent.ainvoke(QUESTION))
    [trajectory] = store.read()
    assert (trajectory.status, trajectory.error) == ("failed", "ValueError: no disk")


def test_an_error_that_inner_middleware_mends_is_no_failure(store):
    @tool
    def broken(x: int) -> str:
        """Fails."""
        raise ValueError("no disk")

    mending = ToolErrorMiddleware(lambda error, request: str(error))
    agent = gated(
        model(calling(call("broken", x=1)), "ok"), [broken], ModelGate(), recorder=Recorder(store), after=[mending]
    )
    ask(agent)
    [trajectory] = store.read()
    assert trajectory.status == "finished"
    assert [(o.status, o.content) for o in trajectory.outcomes] == [("error", "no disk")]


def test_a_store_that_fails_with_the_run_does_not_hide_the_runs_error(tools, caplog):
    class Full:
        def append(self, trajectory):
            raise OSError("full")

    with caplog.at_level(logging.ERROR), pytest.raises(ConnectionError):
        ask(gated(model(ConnectionError("down")), tools, ModelGate(), recorder=Recorder(Full())))
    assert "could not be recorded" in caplog.text


def test_model_calls_keep_their_tokens(tools):
    tokens = {"prompt_ids": [1, 2], "completion_ids": [3], "log_probs": [-0.5]}
    state = ask(gated(model(AIMessage("ok", response_metadata={TOKEN_RECORD: tokens})), tools, ModelGate()))
    assert [(c.prompt_ids, c.completion_ids, c.log_probs) for c in state["calls"]] == [((1, 2), (3,), (-0.5,))]
    assert ask(gated(model("ok"), tools, ModelGate()))["calls"] == []


def test_the_seconds_of_tools_are_counted_and_limited(ran, tools, monkeypatch):
    ticks = SimpleNamespace(perf_counter=itertools.count(0, 100).__next__)
    monkeypatch.setattr("metis_agent.middleware.requests.time", ticks)
    chat = model(*(calling(call("look", id=str(n), query=str(n))) for n in range(5)), "ok")
    state = ask(gated(chat, tools, ModelGate(), budget=Budget(seconds=60)))
    assert ran == [("look", "0")]
    assert [o.seconds for o in state["outcomes"] if o.executed] == [100]
    assert "seconds is spent" in state["decisions"][-1].reason


# Drafts.


class Sure(Gate):
    """Answers where the draft is sure enough."""

    wants_draft = True

    def __init__(self):
        super().__init__()
        self.drafts = []

    def decide(self, request):
        self.drafts.append(request.draft)
        sure = request.draft is not None and min(request.draft.log_probs or (-9,)) > -0.5
        return GateDecision(allowed=() if sure else tuple(spec.name for spec in request.tools), gate="sure")


def draft(text, log_prob):
    return AIMessage(text, response_metadata={"logprobs": {"content": [{"token": text, "logprob": log_prob}]}})


@pytest.mark.parametrize("flavour", ["sync", "async"])
def test_an_accepted_draft_is_the_answer_and_costs_nothing_more(tools, flavour):
    chat, gate = model(draft("four", -0.1)), Sure()
    agent = gated(chat, tools, gate, record_calls=True)
    state = agent.invoke(QUESTION) if flavour == "sync" else asyncio.run(agent.ainvoke(QUESTION))
    assert shape(state) == [("human", "q"), ("ai", "four")]
    assert [asked.tools for asked in chat.asked] == [()]
    assert [(d.text, d.log_probs) for d in gate.drafts] == [("four", (-0.1,))]
    assert [(c.node, c.log_probs) for c in state["calls"]] == [("draft", (-0.1,))]


def test_a_rejected_draft_is_kept_for_the_gate_and_out_of_sight(ran, tools):
    chat, gate = model(draft("four?", -2.0), calling(call("look", query="x")), "five"), Sure()
    agent = gated(chat, tools, gate)
    events = list(agent.stream(QUESTION, stream_mode=["messages", "values"]))
    assert shape(events[-1][1]) == [("human", "q"), ("ai", ""), ("tool", "found x"), ("ai", "five")]
    assert "four?" not in [str(message.text) for mode, event in events if mode == "messages" for message in event[:1]]
    assert [d.text for d in gate.drafts] == ["four?", "four?"]
    assert len(chat.asked) == 3


def test_an_accepted_draft_is_streamed(tools):
    agent = gated(model(draft("four", -0.1)), tools, Sure())
    events = list(agent.stream(QUESTION, stream_mode="messages"))
    assert [str(message.text) for message, _ in events] == ["four"]


def test_a_draft_that_fails_leaves_the_gate_to_decide_without(tools):
    chat, gate = model(ConnectionError("down"), "ok"), Sure()
    state = ask(gated(chat, tools, gate))
    assert gate.drafts == [None]
    assert "draft failed with ConnectionError" in state["decisions"][0].reason
    assert state["messages"][-1].content == "ok"


def test_calls_in_a_draft_are_taken_out(ran, tools):
    reply = AIMessage(
        "four", tool_calls=[call("pay", amount=1)], response_metadata=draft("four", -0.1).response_metadata
    )
    state = ask(gated(model(reply), tools, Sure()))
    assert ran == []
    assert answered(state) == {}
    assert statuses(state) == ["blocked"]


def test_a_structured_draft_is_a_structured_answer(tools):
    reply = AIMessage("", tool_calls=[call("Verdict", text="yes")], response_metadata=draft("", -0.1).response_metadata)
    gate = Sure()
    state = ask(gated(model(reply), tools, gate, agent={"response_format": ToolStrategy(Verdict)}))
    assert state["structured_response"] == Verdict(text="yes")
    assert gate.drafts[0].text == '{"text": "yes"}'
    assert list(answered(state)) == ["call_1"]


def test_log_probabilities_are_asked_for_where_the_model_has_them(tools):
    chat = model(draft("four", -0.1))
    asked = []

    class Probable(type(chat)):
        logprobs: bool | None = None

        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            asked.append(kwargs.get("logprobs"))
            return super()._generate(messages, stop, run_manager, **kwargs)

    ask(gated(Probable(script=[draft("no", -3.0), "ok"]), tools, Sure()))
    assert asked == [True, None]
