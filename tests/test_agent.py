"""The agent as a LangGraph citizen: what it refuses, and what it is."""

import inspect
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import SystemMessage
from langchain_core.tools import StructuredTool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph.state import CompiledStateGraph
from typing_extensions import TypedDict

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.errors import ConfigurationError, MissingDependencyError, UnknownToolError
from metis_agent.gates import ModelGate, NeverGate
from metis_agent.recording.recorder import Recorder
from metis_agent.rules.budget import Budget
from metis_agent.types import GateDecision, ToolOutcome
from tests.fakes import ScriptedChatModel, call, calling, model
from tests.looking import ask, look, looking

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
        ({"tools": [5]}, "no tool"),
        ({"gate": "always"}, "no gate"),
        ({"tool_timeout": 0}, "tool_timeout"),
        ({"tool_timeout": float("nan")}, "tool_timeout"),
        ({"block_message": "{why}"}, "block_message"),
        ({"block_message": "{"}, "block_message"),
        ({"state_schema": dict}, "TypedDict"),
        ({"system_prompt": lambda state: "Be brief."}, "dynamic_prompt"),
        ({"state_schema": TypedDict("Bad", {"messages": list, "outcomes": int})}, "'outcomes'"),
    ],
)
def test_wrong_arguments_are_refused(options, word):
    with pytest.raises(ConfigurationError, match=word):
        create_metis_agent(**{"model": model(), "tools": [look], **options})


@pytest.mark.parametrize(
    "bound",
    [{"type": "function", "function": {"name": "look"}}, {"name": "look"}, {"type": "function", "name": "look"}],
)
@pytest.mark.parametrize("tools", [["look", "pay"], ["pay"], []])
def test_a_model_bound_to_other_functions_is_refused(tools, bound):
    chat = model().bind(tools=[bound])
    assert create_metis_agent(chat, [look]).metis.offer.names == ("look",)
    with pytest.raises(ConfigurationError, match="bound to the functions \\['look'\\]"):
        create_metis_agent(chat, [StructuredTool.from_function(len, name=name, description="?") for name in tools])


def test_a_model_that_takes_no_tools_is_refused_with_tools():
    class Plain(ScriptedChatModel):
        def bind_tools(self, tools, **kwargs):
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="bind_tools"):
        create_metis_agent(Plain(), [look])
    assert create_metis_agent(Plain()).invoke(ask())["messages"][-1].content == "done"


def test_a_model_by_name_needs_langchain(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langchain.chat_models", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'langgraph-metis\[langchain\]'"):
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


@pytest.mark.parametrize("lists", [{"never": ["lok"]}, {"always": "look"}, {"ungated": ["look", "pay"]}])
def test_lists_name_tools_of_the_agent(lists):
    def look(query: str) -> str:
        """Look it up."""
        return query

    with pytest.raises(UnknownToolError, match=next(iter(lists))):
        create_metis_agent(model(), [look], **lists)
