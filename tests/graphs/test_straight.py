"""Rollouts run an agent's nodes without LangGraph's engine: what comes out is what `ainvoke` gives."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_config, get_store, get_stream_writer
from langgraph.errors import GraphRecursionError
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, interrupt

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.errors import InfrastructureError
from metis_agent.gates import AlwaysGate, DraftConfidenceGate, NeverGate
from metis_agent.rules.budget import Budget
from tests.fakes import call, calling, model

QUESTION = {"messages": [("user", "How many?")]}


@tool
def count(what: str) -> str:
    """Count."""
    return f"{len(what)} {what}"


@tool
async def wait(seconds: float) -> str:
    """Wait."""
    return f"waited {seconds}"


@tool
def fail() -> str:
    """Fail."""
    raise ValueError("broken")


@tool(return_direct=True)
def tell(answer: str) -> str:
    """Tell."""
    return answer


@tool
def leap() -> Command[Any]:
    """Write to state."""
    return Command(update={"no_such_key": 1})


@tool
def ask() -> str:
    """Ask a person."""
    return str(interrupt("may I?"))


TOOLS = [count, wait, fail, tell, leap, ask]
SCRIPTS: dict[str, tuple[Any, ...]] = {
    "direct": ("4",),
    "one call": (calling(call("count", what="ab")), "2"),
    "side by side": (
        calling(call("count", "a", what="ab"), call("wait", "b", seconds=0.0), call("fail", "c"), call("none", "d")),
        calling(call("count", "a", what="abc")),
        "3",
    ),
    "repeated": (calling(call("count", what="ab")), calling(call("count", "again", what="ab")), "2"),
    "direct result": (calling(call("tell", answer="42")),),
    "a command": (calling(call("leap")), "done"),
    "an interrupt": (calling(call("count", "a", what="ab"), call("ask", "b")), "done"),
    "no answer": ("", ""),
}


def plain(state: dict[str, Any]) -> Any:
    """Without ids that are drawn and times."""
    records = [
        {key: value for key, value in vars(record).items() if key not in ("seconds", "message_id")}
        for name in ("decisions", "outcomes", "calls")
        for record in state[name]
    ]
    return [(m.type, m.content, getattr(m, "tool_calls", None), m.name) for m in state["messages"]], records


def agent_for(script: tuple[Any, ...], **keywords: Any) -> MetisAgent:
    return create_metis_agent(model(*script), TOOLS, record_calls=True, **keywords)


@pytest.mark.parametrize(
    "gate", [None, NeverGate(), AlwaysGate(), DraftConfidenceGate()], ids=["model", "never", "always", "draft"]
)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
async def test_the_result_is_that_of_ainvoke(
    script: tuple[Any, ...], gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [agent_for(script, gate=gate, budget=Budget(calls=2)) for _ in range(2)]
    config = {"configurable": {"seed": 3}}
    expected = await agents[0].ainvoke(QUESTION, config)
    expected.pop("__interrupt__", None)
    monkeypatch.setattr("langgraph.pregel.Pregel.astream", None)  # which LangGraph's engine is
    found = await agents[1].aresult(QUESTION, config)
    assert plain(found) == plain(expected)
    assert set(found) == set(expected)


async def test_an_error_of_the_infrastructure_is_raised() -> None:
    @tool
    def down() -> str:
        """Be down."""
        raise InfrastructureError("the sandbox is down")

    agent = create_metis_agent(model(calling(call("down", "a"), call("down", "b"))), [down])
    with pytest.raises(InfrastructureError, match="the sandbox is down"):
        await agent.aresult(QUESTION)


async def test_a_run_without_end_is_stopped() -> None:
    agent = agent_for((calling(call("count", what="ab")), "2"))
    with pytest.raises(GraphRecursionError, match="within 2 steps"):
        await agent.aresult(QUESTION, {"recursion_limit": 2})


class Heard(AsyncCallbackHandler):
    """Counts the chains that it hears of."""

    chains = 0

    async def on_chain_start(self, *_: Any, **__: Any) -> None:
        self.chains += 1


async def test_what_else_is_wanted_of_a_run_is_left_to_langgraph() -> None:
    heard = Heard()
    await agent_for(("4",)).aresult(QUESTION, {"callbacks": [heard]})
    assert heard.chains
    kept = agent_for(("4",), checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "a"}}
    await kept.aresult(QUESTION, thread)
    assert kept.get_state(thread).values["messages"][-1].text == "4"


async def test_a_tool_finds_the_seed_and_the_store() -> None:
    seen = []

    @tool
    def look() -> str:
        """Look."""
        get_stream_writer()("nobody hears")
        seen.append((get_config()["configurable"]["seed"], get_store()))
        return "looked"

    store = InMemoryStore()
    agent = create_metis_agent(model(calling(call("look")), "done"), [look], store=store)
    await agent.aresult(QUESTION, {"configurable": {"seed": 7}})
    assert seen == [(7, store)]
