"""An agent that looks once, and then answers: what the tests of the agent run."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool

from metis_agent.agent import MetisAgent, create_metis_agent
from tests.fakes import call, calling, model


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
