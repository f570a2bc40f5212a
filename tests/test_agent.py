"""The agent as a LangGraph citizen: what it refuses, and that everything a compiled graph can do works."""

import asyncio
import inspect
import logging
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.prebuilt import InjectedState, InjectedStore, ToolRuntime
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.budget import Budget
from metis_agent.errors import ConfigurationError, MissingDependencyError, UnknownToolError
from metis_agent.gates import ModelGate, NeverGate
from metis_agent.graphs.state import MetisState
from metis_agent.recording.recorder import Recorder
from metis_agent.types import GateDecision, ToolOutcome
from tests.fakes import ScriptedChatModel, call, calling, model


def ask(**more: Any) -> dict[str, Any]:
    """The input of a run."""
    return {"messages": [HumanMessage("q")], **more}


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


def looking(**options: Any) -> MetisAgent:
    """An agent that looks once, and then answers."""
    return create_metis_agent(model(looks_once), [look], **options)


def looks_once(messages: list[Any]) -> Any:
    return "x it is" if isinstance(messages[-1], ToolMessage) else calling(call("look", query="x"))


def thread(name: str = "1") -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


# What is refused


@pytest.mark.parametrize("name", ["gate", "act", "answer", "record", "messages", "outcomes", "a|b", "a:b", "__x"])
def test_tools_cannot_have_the_names_of_nodes_or_state(name):
    with pytest.raises(ConfigurationError, match="Rename it"):
        create_metis_agent(model(), [look.model_copy(update={"name": name})])


def test_duplicate_tools_are_refused():
    with pytest.raises(ConfigurationError, match="'look'"):
        create_metis_agent(model(), [look, look])


def test_limits_of_unknown_tools_are_refused():
    with pytest.raises(UnknownToolError, match="'serch'"):
        create_metis_agent(model(), [look], budget=Budget(calls_per_tool={"serch": 1}))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": 5}, "chat model"),
        ({"tools": [{"type": "web_search"}]}, "no tool"),
        ({"gate": "always"}, "no gate"),
        ({"tool_timeout": 0}, "tool_timeout"),
        ({"tool_timeout": float("nan")}, "tool_timeout"),
        ({"block_message": "{why}"}, "block_message"),
        ({"block_message": "{"}, "block_message"),
        ({"state_schema": dict}, "TypedDict"),
        ({"state_schema": TypedDict("Bad", {"messages": list, "outcomes": int})}, "'outcomes'"),
    ],
)
def test_wrong_arguments_are_refused(options, word):
    with pytest.raises(ConfigurationError, match=word):
        create_metis_agent(**{"model": model(), "tools": [look], **options})


def test_a_model_that_takes_no_tools_is_refused_with_tools():
    class Plain(ScriptedChatModel):
        def bind_tools(self, tools, **kwargs):
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="bind_tools"):
        create_metis_agent(Plain(), [look])
    assert create_metis_agent(Plain()).invoke(ask())["messages"][-1].content == "done"


def test_a_model_by_name_needs_langchain(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langchain.chat_models", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'metis-agent\[langchain\]'"):
        create_metis_agent("openai:gpt-5")


def test_a_model_by_name(monkeypatch):
    chat = model("named")
    monkeypatch.setattr("langchain.chat_models.init_chat_model", lambda name: chat if name == "fake:it" else None)
    assert create_metis_agent("fake:it").invoke(ask())["messages"][-1].content == "named"


# What it is


def test_it_is_a_compiled_graph_that_knows_its_parts():
    agent = looking(gate=NeverGate(), budget=Budget(calls=3), name="metis")
    assert isinstance(agent, CompiledStateGraph)
    assert isinstance(agent.gate, NeverGate)
    assert list(agent.tools) == ["look"]
    assert agent.budget.calls == 3
    assert agent.name == "metis"
    assert agent.config["recursion_limit"] == Budget(calls=3).max_steps
    assert isinstance(looking().gate, ModelGate)


def test_its_keywords_are_those_of_create_agent():
    missing = {"middleware", "response_format", "transformers"}
    own = set(inspect.signature(create_metis_agent).parameters)
    assert set(inspect.signature(create_agent).parameters) - missing <= own


def test_its_nodes_are_the_architecture():
    graph = looking().get_graph()
    assert set(graph.nodes) == {"__start__", "gate", "act", "answer", "look", "__end__"}
    edges = {(edge.source, edge.target) for edge in graph.edges}
    assert edges == {
        ("__start__", "gate"), ("gate", "act"), ("gate", "answer"), ("act", "look"), ("act", "gate"),
        ("act", "__end__"), ("look", "gate"), ("answer", "__end__"),
    }  # fmt: skip


def test_copies_keep_their_parts():
    agent = looking().with_config(tags=["mine"], recursion_limit=50)
    assert isinstance(agent, MetisAgent)
    assert agent.config["recursion_limit"] == 50
    assert isinstance(agent.copy({"name": "other"}).gate, ModelGate)
    assert agent.invoke(ask())["messages"][-1].content == "x it is"


def test_the_same_agent_behind_another_gate():
    kept: list[Any] = []

    class Sink:
        def append(self, trajectory: Any) -> None:
            kept.append(trajectory)

    agent = looking(budget=Budget(calls=3), recorder=Recorder(Sink()), checkpointer=InMemorySaver(), name="mine")
    other = agent.with_gate(NeverGate())
    assert (other.gate.name, other.budget, other.name) == ("NeverGate", agent.budget, "mine")
    # Neither a thread nor a record, and what the model asks for is blocked.
    state = other.invoke(ask())
    assert [outcome.status for outcome in state["outcomes"]] == ["blocked"] * len(state["outcomes"])
    assert state["calls"]
    assert not kept
    assert isinstance(agent.gate, ModelGate)


def test_input_and_output():
    agent = looking()
    assert set(agent.get_input_jsonschema()["properties"]) == {"messages"}
    assert set(agent.get_output_jsonschema()["properties"]) == {"messages", "decisions", "outcomes", "calls"}
    state = agent.invoke({"messages": [{"role": "user", "content": "q"}]})
    assert set(state) == {"messages", "decisions", "outcomes", "calls"}
    assert all(isinstance(decision, GateDecision) for decision in state["decisions"])
    assert all(isinstance(outcome, ToolOutcome) for outcome in state["outcomes"])


@pytest.mark.parametrize("prompt", ["be brief", SystemMessage("be brief")])
def test_the_system_prompt_goes_first_at_every_call(prompt):
    chat = model(calling(call("look", query="x")), "ok")
    state = create_metis_agent(chat, [look], system_prompt=prompt).invoke(ask())
    assert [asked.messages[0].content for asked in chat.asked] == ["be brief", "be brief"]
    assert state["messages"][0].type == "human"


def test_functions_become_tools_and_the_name_marks_the_messages():
    def shout(text: str) -> str:
        """Shout."""
        return text.upper()

    agent = create_metis_agent(model(calling(call("shout", text="x")), "ok"), [shout], name="metis")
    state = agent.invoke(ask())
    assert state["messages"][2].content == "X"
    assert state["messages"][-1].name == "metis"


# Runs


async def test_batches():
    for states in (looking().batch([ask(), ask()]), await looking().abatch([ask(), ask()])):
        assert [state["messages"][-1].content for state in states] == ["x it is", "x it is"]


@pytest.mark.parametrize("mode", ["values", "updates", "messages", "custom", "debug", "tasks"])
async def test_every_stream_mode(mode):
    sync = list(looking().stream(ask(), stream_mode=mode))
    later = [chunk async for chunk in looking().astream(ask(), stream_mode=mode)]
    assert sync
    assert len(sync) == len(later)


def test_several_modes_at_once_and_subgraphs():
    chunks = list(looking().stream(ask(), stream_mode=["updates", "custom"], subgraphs=True))
    assert {mode for _, mode, _ in chunks} == {"updates", "custom"}


def test_updates_are_plain_values_by_node():
    updates = list(looking().stream(ask(), stream_mode="updates"))
    assert [next(iter(update)) for update in updates] == ["gate", "act", "look", "gate", "act"]
    assert updates[0]["gate"]["decisions"][0]["allowed"] == ("look",)
    assert updates[2]["look"]["outcomes"][0]["status"] == "ok"


async def test_decisions_are_in_the_custom_stream():
    sync = list(looking().stream(ask(), stream_mode="custom"))
    assert sync == [event async for event in looking().astream(ask(), stream_mode="custom")]
    assert [event["type"] for event in sync] == ["metis_decision", "metis_decision"]
    assert sync[0]["allowed"] == ("look",)


def test_messages_are_streamed_once():
    seen = [message.content for message, _ in looking().stream(ask(), stream_mode="messages")]
    assert seen.count("x it is") == 1
    assert seen.count("found x") == 1


async def test_version_2():
    result = looking().invoke(ask(), version="v2")
    assert (result.value["messages"][-1].content, result.interrupts) == ("x it is", ())
    assert (await looking().ainvoke(ask(), version="v2")).value["messages"][-1].content == "x it is"
    parts = list(looking().stream(ask(), stream_mode="updates", version="v2"))
    assert {part["type"] for part in parts} == {"updates"}


async def test_other_stream_modes_of_invoke():
    assert len(looking().invoke(ask(), stream_mode="updates")) == 5
    assert len(await looking().ainvoke(ask(), stream_mode="updates")) == 5


async def test_events():
    names = [event["name"] async for event in looking().astream_events(ask(), version="v2")]
    assert {"gate", "act", "look"} <= set(names)


def test_many_runs_side_by_side():
    agent = looking()

    async def run() -> list[Any]:
        return await asyncio.gather(*(agent.ainvoke(ask()) for _ in range(20)))

    assert all(len(state["outcomes"]) == 1 for state in asyncio.run(run()))


# Memory


async def test_decisions_and_outcomes_are_those_of_the_latest_turn(caplog):
    agent = looking(checkpointer=InMemorySaver(), record_calls=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            state = await agent.ainvoke(ask(), thread())
            assert len(state["decisions"]) == 2
            assert len(state["outcomes"]) == 1
            assert [item.step for item in state["calls"]] == [0, 1]
    assert len(state["messages"]) == 12
    assert not caplog.records  # classes that a checkpointer does not know are warned about
    stored = agent.get_state(thread()).values
    assert isinstance(stored["outcomes"][0], ToolOutcome)
    assert agent.get_state(thread()).next == ()


def test_the_budget_is_new_at_every_turn():
    agent = looking(checkpointer=InMemorySaver(), budget=Budget(calls=1, seconds=60))
    for _ in range(2):
        assert [outcome.status for outcome in agent.invoke(ask(), thread())["outcomes"]] == ["ok"]


async def test_stopping_before_a_tool_and_going_on(caplog):
    for later in (False, True):
        agent = looking(checkpointer=InMemorySaver(), interrupt_before=["look"])
        if later:
            await agent.ainvoke(ask(), thread())
        else:
            agent.invoke(ask(), thread())
        assert agent.get_state(thread()).next == ("look",)
        assert agent.get_state(thread()).values["outcomes"] == []
        state = await agent.ainvoke(None, thread()) if later else agent.invoke(None, thread())
        assert state["messages"][-1].content == "x it is"
        assert [outcome.status for outcome in state["outcomes"]] == ["ok"]
    assert not caplog.records


def test_stopping_after_the_gate():
    agent = looking(checkpointer=InMemorySaver(), interrupt_after=["gate"])
    agent.invoke(ask(), thread())
    assert agent.get_state(thread()).next == ("act",)


async def test_an_interrupt_in_a_tool_and_its_answer(caplog):
    @tool
    def confirm(text: str) -> str:
        """Ask the user."""
        return f"user said {interrupt(text)}"

    for agent_maker in (create_metis_agent, create_agent):
        for later in (False, True):
            chat = model(calling(call("confirm", id="1", text="sure?"), call("look", id="2", query="x")), "ok")
            agent = agent_maker(chat, [confirm, look], checkpointer=InMemorySaver())
            state = await agent.ainvoke(ask(), thread()) if later else agent.invoke(ask(), thread())
            assert [item.value for item in state["__interrupt__"]] == ["sure?"]
            resume = Command(resume="yes")
            state = await agent.ainvoke(resume, thread()) if later else agent.invoke(resume, thread())
            results = {m.tool_call_id: m.content for m in state["messages"] if isinstance(m, ToolMessage)}
            assert results == {"1": "user said yes", "2": "found x"}
            assert "__interrupt__" not in state
    assert not [record for record in caplog.records if "metis_agent" in record.getMessage()]


def test_a_thread_whose_tool_call_was_lost_goes_on():
    agent = looking(checkpointer=InMemorySaver())
    lost = calling(call("look", id="lost", query="y"))
    agent.update_state(thread(), {"messages": [HumanMessage("before"), lost]}, as_node="act")
    chat = agent.metis.models._model
    agent.invoke(ask(), thread())
    asked = chat.asked[0].messages
    assert [message.type for message in asked] == ["human", "ai", "tool", "human"]
    assert asked[2].tool_call_id == "lost"


def test_the_same_message_sent_again_is_a_new_turn():
    agent, question = looking(checkpointer=InMemorySaver(), budget=Budget(calls=1)), HumanMessage("q", id="same")
    chat = agent.metis.models._model
    chat.script = [calling(call("look", query="x")), "one", calling(call("look", query="x")), "two"]
    for answer in ("one", "two"):
        state = agent.invoke({"messages": [question]}, thread())
        assert state["messages"][-1].content == answer
        assert [outcome.status for outcome in state["outcomes"]] == ["ok"]


# Tools that are given more than arguments


async def test_injected_state_store_and_runtime():
    class Basket(TypedDict):
        items: list[str]

    @tool
    def put(
        item: str,
        state: Annotated[dict, InjectedState],
        store: Annotated[Any, InjectedStore],
        call_id: Annotated[str, InjectedToolCallId],
    ) -> Command:
        """Put it into the basket."""
        store.put(("seen",), item, {"turns": len(state["decisions"])})
        message = ToolMessage(f"has {item}", tool_call_id=call_id)
        return Command(update={"items": [*state.get("items", []), item], "messages": [message]})

    @tool
    def peek(runtime: ToolRuntime[Any, Any]) -> str:
        """Look into the basket."""
        return f"{runtime.state['items']} for {runtime.context['user']}"

    class Context(TypedDict):
        user: str

    for later in (False, True):
        store = InMemoryStore()
        script = [calling(call("put", id="1", item="apple")), calling(call("peek", id="2")), "ok"]
        agent = create_metis_agent(
            model(*script), [put, peek], state_schema=Basket, context_schema=Context, store=store
        )
        start = ask(items=["pear"])
        if later:
            state = await agent.ainvoke(start, context={"user": "ann"})
        else:
            state = agent.invoke(start, context={"user": "ann"})
        assert state["items"] == ["pear", "apple"]
        assert [m.content for m in state["messages"] if isinstance(m, ToolMessage)] == [
            "has apple",
            "['pear', 'apple'] for ann",
        ]
        assert [outcome.content for outcome in state["outcomes"]] == ["has apple", "['pear', 'apple'] for ann"]
        assert store.get(("seen",), "apple").value == {"turns": 1}


def test_state_schemas_of_others_fit():
    from langchain.agents import AgentState

    class Mine(AgentState):
        user: str

    class Ours(MetisState):
        user: str

    for schema in (Mine, Ours, MessagesState):
        agent = create_metis_agent(model("ok"), [look], state_schema=schema)
        assert agent.invoke(ask(user="ann"))["messages"][-1].content == "ok"
    hidden = create_metis_agent(model("ok"), [look], state_schema=Mine).get_input_jsonschema()["properties"]
    assert "jump_to" not in hidden
    assert "user" in hidden


async def test_a_command_without_a_message_is_an_error_that_the_model_reads():
    @tool
    def jump(where: str) -> Command:
        """Jump."""
        return Command(update={})

    state = await create_metis_agent(model(calling(call("jump", where="x")), "ok"), [jump]).ainvoke(ask())
    assert [outcome.status for outcome in state["outcomes"]] == ["error"]
    assert state["messages"][2].tool_call_id == "call_1"


# In other graphs


async def test_as_a_node_of_another_graph():
    builder = StateGraph(MessagesState)
    builder.add_node("metis", looking())
    builder.add_edge(START, "metis")
    builder.add_edge("metis", END)
    graph = builder.compile(checkpointer=InMemorySaver())
    for state in (graph.invoke(ask(), thread("a")), await graph.ainvoke(ask(), thread("b"))):
        assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert [name for name, _ in graph.get_subgraphs()] == ["metis"]
    assert any("gate" in node for node in graph.get_graph(xray=True).nodes)
    namespaces = {part[0] for part in graph.stream(ask(), thread("c"), subgraphs=True)}
    assert len(namespaces) == 2


async def test_an_interrupt_reaches_the_outer_graph():
    @tool
    def confirm(text: str) -> str:
        """Ask the user."""
        return f"user said {interrupt(text)}"

    chat = model(calling(call("confirm", text="sure?")), "ok")
    builder = StateGraph(MessagesState)
    builder.add_node("metis", create_metis_agent(chat, [confirm]))
    builder.add_edge(START, "metis")
    graph = builder.compile(checkpointer=InMemorySaver())
    assert graph.invoke(ask(), thread())["__interrupt__"][0].value == "sure?"
    state = graph.invoke(Command(resume="yes"), thread())
    assert state["messages"][2].content == "user said yes"


def test_a_tool_can_hand_over_to_another_agent():
    @tool
    def transfer(state: Annotated[dict, InjectedState], call_id: Annotated[str, InjectedToolCallId]) -> Command:
        """Hand over."""
        done = ToolMessage("handed over", tool_call_id=call_id, name="transfer")
        return Command(graph=Command.PARENT, goto="other", update={"messages": [*state["messages"], done]})

    other = model("I take over")
    builder = StateGraph(MessagesState)
    builder.add_node("metis", create_metis_agent(model(calling(call("transfer"))), [transfer]), destinations=("other",))
    builder.add_node("other", create_metis_agent(other, [look]))
    builder.add_edge(START, "metis")
    state = builder.compile().invoke(ask())
    assert state["messages"][-1].content == "I take over"
    assert other.asked[0].tools == ("look",)


def test_a_model_that_fails_is_raised():
    with pytest.raises(ConnectionError, match="no route"):
        create_metis_agent(model(ConnectionError("no route")), [look]).invoke(ask())


async def test_a_model_that_runs_out_of_replies_is_no_quiet_end():
    exhausted = GenericFakeChatModel(messages=iter(()))
    with pytest.raises((StopIteration, RuntimeError)):
        create_metis_agent(exhausted).invoke(ask())
    with pytest.raises((StopIteration, RuntimeError)):
        await create_metis_agent(exhausted).ainvoke(ask())


def test_ai_messages_survive(caplog):
    agent = create_metis_agent(model(AIMessage("ok", response_metadata={"model_name": "m"}, id="kept")))
    final = agent.invoke(ask())["messages"][-1]
    assert (final.id, final.response_metadata["model_name"]) == ("kept", "m")
