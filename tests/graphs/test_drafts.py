"""A gate that wants a draft gets one, and an accepted draft is the answer."""

import asyncio
import math

import pytest
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import Field

from metis_agent.agent import create_metis_agent
from metis_agent.errors import ConfigurationError
from metis_agent.gates import DraftConfidenceGate, Gate, NeverGate
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.types import TOKEN_RECORD, GateDecision
from tests.fakes import ScriptedChatModel, call, calling, model


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


def says(text, p, **fields):
    """A reply whose two tokens each have probability p."""
    tokens = [{"token": "x", "logprob": math.log(p)}, {"token": "y", "logprob": math.log(p)}]
    metadata = {"logprobs": {"content": tokens}, "model_name": "scripted"}
    usage = {"input_tokens": 5, "output_tokens": 2, "total_tokens": 7}
    return AIMessage(text, response_metadata=metadata, usage_metadata=usage, **fields)


class Drafting(Gate):
    """Wants a draft, and decides by a script."""

    wants_draft = True

    def __init__(self, *decided):
        super().__init__()
        self.decided = list(decided)
        self.requests = []

    def decide(self, request):
        self.requests.append(request)
        return GateDecision(allowed=self.decided[min(len(self.requests), len(self.decided)) - 1])


@pytest.fixture(params=["sync", "async"])
def run(request):
    def run(agent, text="q", config=None):
        state = {"messages": [HumanMessage(text)]}
        return agent.invoke(state, config) if request.param == "sync" else asyncio.run(agent.ainvoke(state, config))

    return run


def test_an_accepted_draft_is_the_answer_and_the_only_model_call(run):
    chat = model(says("Paris", 0.99))
    usage = UsageMetadataCallbackHandler()
    gate = DraftConfidenceGate(threshold=0.5)
    state = run(create_metis_agent(chat, [look], gate=gate, record_calls=True), config={"callbacks": [usage]})
    assert len(chat.asked) == 1
    assert chat.asked[0].tools == ()
    answer = state["messages"][-1]
    assert answer.content == "Paris"
    assert answer.usage_metadata["total_tokens"] == 7
    (decision,) = state["decisions"]
    assert decision.direct
    assert decision.probabilities["look"] == pytest.approx(0.01)
    (made,) = state["calls"]
    assert (made.node, made.step, made.text) == ("draft", 0, "Paris")
    assert made.usage["total_tokens"] == 7
    assert made.log_probs == pytest.approx((math.log(0.99),) * 2)
    assert usage.usage_metadata["scripted"]["total_tokens"] == 7


def test_a_rejected_draft_stays_out_of_the_conversation_and_is_kept_for_the_turn(run):
    chat = model(says("Perhaps Rome", 0.2), calling(call("look", query="x")), "x it is")
    gate = Drafting(("look",))
    state = run(create_metis_agent(chat, [look], gate=gate, record_calls=True))
    assert [message.content for message in state["messages"]] == ["q", "", "found x", "x it is"]
    assert [item.node for item in state["calls"]] == ["draft", "act", "act"]
    assert [item.step for item in state["calls"]] == [0, 1, 2]
    assert len(gate.requests) == 2
    assert all(request.draft.text == "Perhaps Rome" for request in gate.requests)
    assert all(request.draft.log_probs == pytest.approx((math.log(0.2),) * 2) for request in gate.requests)
    assert all("Perhaps Rome" not in str(asked.messages) for asked in chat.asked)


def test_the_draft_of_one_turn_is_not_that_of_the_next(run):
    gate = Drafting(("look",), ("look",), (), ("look",))
    agent = create_metis_agent(
        model(
            says("Rome", 0.1), calling(call("look", query="x")), "first",
            says("Oslo", 0.9),
            says("Bern", 0.1), calling(call("look", query="y")), "third",
        ),
        [look], gate=gate, checkpointer=InMemorySaver(), record_calls=True,
    )  # fmt: skip
    thread = {"configurable": {"thread_id": "1"}}
    answers, nodes, outcomes = [], [], []
    for _ in range(3):
        state = run(agent, config=thread)
        answers.append(state["messages"][-1].content)
        nodes.append([item.node for item in state["calls"]])
        outcomes.append(len(state["outcomes"]))
    assert answers == ["first", "Oslo", "third"]
    assert nodes == [["draft", "act", "act"], ["draft"], ["draft", "act", "act"]]
    assert outcomes == [1, 0, 1]
    assert [request.draft.text for request in gate.requests] == ["Rome", "Rome", "Oslo", "Bern", "Bern"]
    assert "drafted" not in state


def test_no_draft_is_written_where_nothing_is_to_be_decided(run):
    for tools, budget in (([], None), ([look], Budget(calls=0))):
        chat = model("plain")
        state = run(create_metis_agent(chat, tools, gate=Drafting(("look",)), budget=budget, record_calls=True))
        assert len(chat.asked) == 1
        assert [item.node for item in state["calls"]] == ["answer"]
    assert (
        run(create_metis_agent(model("plain"), [look], gate=NeverGate(), record_calls=True))["calls"][0].node
        == "answer"
    )


def test_a_failing_draft_is_said_and_the_gate_decides_without(run):
    def fail(messages):
        raise RuntimeError("too many requests")

    gate = Drafting(())
    state = run(create_metis_agent(model(fail, "in the end"), [look], gate=gate, record_calls=True))
    assert gate.requests[0].draft is None
    assert state["messages"][-1].content == "in the end"
    assert state["decisions"][0].reason == "the direct draft failed with RuntimeError: too many requests"
    assert [item.node for item in state["calls"]] == ["answer"]


def test_a_gate_that_cannot_do_without_a_draft_falls_back_to_the_model(run):
    def fail(messages):
        raise TimeoutError("slow")

    for first in (fail, "no log-probabilities"):
        state = run(create_metis_agent(model(first, "by itself"), [look], gate=DraftConfidenceGate()))
        assert state["messages"][-1].content == "by itself"
        assert state["decisions"][0].allowed == ("look",)
        assert "the gate failed with GateError" in state["decisions"][0].reason
        assert ("TimeoutError" in state["decisions"][0].reason) == (first is fail)


def test_an_empty_draft_is_no_answer(run):
    state = run(create_metis_agent(model("  ", "asked properly"), [look], gate=Drafting(()), record_calls=True))
    assert state["messages"][-1].content == "asked properly"
    assert [item.node for item in state["calls"]] == ["draft", "answer"]


def test_calls_in_an_accepted_draft_are_blocked(run):
    chat = model(calling(call("look", query="x"), text="Paris"))
    state = run(create_metis_agent(chat, [look], gate=Drafting(())))
    assert (state["messages"][-1].content, state["messages"][-1].tool_calls) == ("Paris", [])
    assert [outcome.status for outcome in state["outcomes"]] == ["blocked"]


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_draft_is_seen_in_the_stream_only_as_the_answer(accepted):
    def agent():
        chat = model(says("a draft", 0.9), "later")
        return create_metis_agent(chat, [look], gate=Drafting(() if accepted else ("look",)))

    question = {"messages": [HumanMessage("q", id="q")]}
    sync = [message.content for message, _ in agent().stream(question, stream_mode="messages")]
    later = [message.content async for message, _ in agent().astream(question, stream_mode="messages")]
    assert sync == later == (["a draft"] if accepted else ["later"])


def test_streamed_tokens_of_a_draft_stay_unseen():
    class Streaming(ScriptedChatModel):
        def _stream(self, messages, stop=None, run_manager=None, **kwargs):
            from langchain_core.messages import AIMessageChunk
            from langchain_core.outputs import ChatGenerationChunk

            text = self._generate(messages, **kwargs).generations[0].message.content
            for word in text.split():
                chunk = ChatGenerationChunk(message=AIMessageChunk(word))
                if run_manager:
                    run_manager.on_llm_new_token(word, chunk=chunk)
                yield chunk

    agent = create_metis_agent(Streaming(script=["dra ft", "an swer"]), [look], gate=Drafting(("look",)))
    seen = [m.content for m, _ in agent.stream({"messages": [HumanMessage("q")]}, stream_mode="messages")]
    assert "".join(seen) == "answer"


def test_log_probabilities_are_asked_for_where_the_model_has_the_setting(run):
    class Openai(ScriptedChatModel):
        logprobs: bool | None = None
        kinds: list[bool | None] = Field(default_factory=list)

        def _generate(self, messages, stop=None, run_manager=None, **kwargs):
            self.kinds.append(kwargs.get("logprobs"))
            return super()._generate(messages, stop, run_manager, **kwargs)

    for setting, asked in ((None, [True, None]), (False, [None, None])):
        chat = Openai(script=["draft", "answer"], logprobs=setting)
        run(create_metis_agent(chat, [look], gate=Drafting(("look",))))
        assert chat.kinds == asked


def test_a_draft_turn_is_recorded(run, tmp_path):
    with TrajectoryStore(tmp_path) as store:
        agent = create_metis_agent(
            model(says("Paris", 0.9)), [look], gate=DraftConfidenceGate(), recorder=Recorder(store)
        )
        run(agent)
        (trajectory,) = store.read()
    assert trajectory.answer == "Paris"
    assert trajectory.calls[0].node == "draft"
    assert trajectory.decisions[0].direct
    assert trajectory.seconds > 0


def test_the_time_of_a_draft_is_the_models_not_the_gates(run, tmp_path):
    import time

    def slow(messages):
        time.sleep(0.05)
        return "draft"

    with TrajectoryStore(tmp_path) as store:
        run(create_metis_agent(model(slow), [look], gate=Drafting(()), recorder=Recorder(store)))
        (trajectory,) = store.read()
    assert trajectory.seconds >= 0.05
    assert trajectory.decisions[0].seconds < trajectory.seconds - 0.045


def test_a_token_record_is_read_without_its_forced_tokens(run):
    tokens = {"prompt_ids": [1], "completion_ids": [2, 3], "log_probs": [-9.0, -0.1], "forced": 1}
    gate = Drafting(())
    run(create_metis_agent(model(AIMessage("x", response_metadata={TOKEN_RECORD: tokens})), [look], gate=gate))
    assert gate.requests[0].draft.log_probs == (-0.1,)


def test_the_drawn_graph_shows_that_a_draft_may_end_the_turn():
    def ends(gate):
        graph = create_metis_agent(model(), [look], gate=gate).get_graph()
        return ("gate", "__end__") in {(edge.source, edge.target) for edge in graph.edges}

    assert ends(Drafting(()))
    assert not ends(NeverGate())


def test_tools_are_checked_when_the_agent_is_made():
    class Picky(Gate):
        def check_tools(self, tools):
            raise ConfigurationError(f"not these: {[one.name for one in tools]}")

        def decide(self, request):
            return GateDecision(allowed=())

    class Theirs:
        wants_draft = True
        check_tools = Picky.check_tools
        decide = Picky.decide

    for gate in (Picky(), Theirs()):
        with pytest.raises(ConfigurationError, match=r"not these: \['look'\]"):
            create_metis_agent(model(), [look], gate=gate)


def test_a_run_that_stops_between_draft_and_call_goes_on_with_the_same_draft(run, caplog):
    chat = model(says("Rome", 0.1), calling(call("look", query="x")), "x it is")
    gate = Drafting(("look",))
    agent = create_metis_agent(chat, [look], gate=gate, checkpointer=InMemorySaver(), interrupt_before=["act"])
    thread = {"configurable": {"thread_id": "1"}}
    run(agent, config=thread)
    assert agent.get_state(thread).next == ("act",)
    for _ in range(2):
        state = agent.invoke(None, thread)
    assert state["messages"][-1].content == "x it is"
    assert len(chat.asked) == 3
    assert [request.draft.text for request in gate.requests] == ["Rome", "Rome"]
    assert not caplog.records  # checkpoints hold plain values only
