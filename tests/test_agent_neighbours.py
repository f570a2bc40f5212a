"""The agent beside other parts: tools that are given more than arguments, and other graphs around it."""

from typing import Annotated, Any, NotRequired

import pytest
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.managed import RemainingSteps
from langgraph.prebuilt import InjectedState, InjectedStore, ToolRuntime
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from typing_extensions import TypedDict

from metis_agent.agent import create_metis_agent
from metis_agent.gates import NeverGate
from metis_agent.graphs.build import MetisState
from tests.fakes import call, calling, model
from tests.looking import ask, look, looking, thread

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


def test_the_runtime_may_stand_in_a_tools_own_schema():
    # As in LangChain's shell.
    class Shown(BaseModel):
        item: str
        runtime: Any = None

    @tool(args_schema=Shown)
    def put(item: str, runtime: ToolRuntime) -> str:
        """Put it away."""
        return f"{item} for {runtime.tool_call_id}"

    [outcome] = create_metis_agent(model(calling(call("put", id="1", item="x")), "ok"), [put]).invoke(ask())["outcomes"]
    assert outcome.content == "x for 1"

    # And is the model's where the function takes it for an argument like any other.
    @tool
    def job(code: str, runtime: str) -> str:
        """Run it."""
        return f"{code} on {runtime!r}"

    asked = model(calling(call("job", id="1", code="x", runtime="py3")), "ok")
    [outcome] = create_metis_agent(asked, [job]).invoke(ask())["outcomes"]
    assert outcome.content == "x on 'py3'"


@pytest.mark.parametrize("given", [InjectedStore(), InjectedState("basket")])
async def test_what_a_tool_is_to_be_given_and_the_agent_does_not_have_raises(given):
    def put(item: str, it):
        """Put it away."""

    put.__annotations__["it"] = Annotated[Any, given]
    agent = create_metis_agent(model(calling(call("put", item="apple"))), [tool(put)])
    with pytest.raises((ValueError, KeyError), match=r"inject store|basket"):
        agent.invoke(ask())
    with pytest.raises((ValueError, KeyError), match=r"inject store|basket"):
        await agent.ainvoke(ask())


def test_state_schemas_of_others_fit():
    from langchain.agents import AgentState

    class Mine(AgentState):
        user: str

    class Ours(MetisState):
        user: str

    class Managed(MessagesState):
        user: str
        remaining_steps: NotRequired[RemainingSteps]

    for schema in (Mine, Ours, MessagesState, Managed):
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


def test_a_chat_model_within_a_sequence():
    """As a supervisor puts its workers' names into messages."""
    chat = model(calling(call("look", query="x")), "it is x")
    named = RunnableLambda(lambda asked: asked) | chat.bind_tools([look]) | RunnableLambda(lambda said: said)
    assert create_metis_agent(named, [look]).invoke(ask())["messages"][-1].text == "it is x"
    assert [asked.tools for asked in chat.asked] == [("look",)] * 2
    chat = model("hello")
    sequence = RunnableLambda(lambda asked: asked) | chat
    assert create_metis_agent(sequence, [look], gate=NeverGate()).invoke(ask())["messages"][-1].text == "hello"
    assert chat.asked[0].tools == ()
