"""The graph's state, and the graph itself.

The agent's state: what comes in, what goes out, and what the nodes keep between them.

`decisions`, `outcomes` and `calls` describe the latest turn; the gate node clears them when a new turn begins.
History is the trajectory store's business.

Wiring, and nothing else: START -> gate -> (answer | act); act -> one node per tool -> gate; then END.
"""

from __future__ import annotations

from typing import Annotated, Any, Required, get_type_hints

from langchain_core.messages import AnyMessage
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict, is_typeddict

from metis_agent.errors import ConfigurationError
from metis_agent.graphs.models import Setup
from metis_agent.graphs.nodes import AskingNode, GateNode, RecordNode, tool_nodes
from metis_agent.rules.state import Notes, Records, RunMarker
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["NODES", "MetisInput", "MetisOutput", "MetisState", "build_graph", "schemas_with"]


class MetisInput(TypedDict):
    """What a run takes."""

    messages: Required[Annotated[list[AnyMessage], add_messages]]


class MetisOutput(TypedDict):
    """What a run gives."""

    messages: Required[Annotated[list[AnyMessage], add_messages]]
    decisions: Annotated[list[GateDecision], Records(GateDecision, append=False)]
    outcomes: Annotated[list[ToolOutcome], Records(ToolOutcome)]
    calls: Annotated[list[ModelCall], Records(ModelCall)]


class MetisState(MetisOutput):
    """What the nodes share."""

    metis_turn: Notes
    metis_run: RunMarker


def schemas_with(extra: type[Any] | None) -> tuple[type[Any], type[Any], type[Any]]:
    """State, input and output schema, with the fields of a user's own state schema added to each.

    Raises:
        ConfigurationError: the schema is no `TypedDict`, or it gives one of the agent's own keys another meaning.
    """
    if extra is None:
        return MetisState, MetisInput, MetisOutput
    if not is_typeddict(extra):
        raise ConfigurationError(
            f"state_schema is {extra!r}; it must be a TypedDict, such as a subclass of "
            "metis_agent.graphs.build.MetisState."
        )
    own = get_type_hints(MetisState, include_extras=True)
    added = {}
    for key, annotation in get_type_hints(extra, include_extras=True).items():
        if key not in own:
            added[key] = annotation
        elif key != "messages" and annotation != own[key]:
            raise ConfigurationError(
                f"state_schema defines {key!r} as {annotation!r}; that key belongs to the agent. Rename it."
            )
    return (
        _extended(MetisState, added),
        _extended(MetisInput, {key: hint for key, hint in added.items() if not _omitted(hint, "input")}),
        _extended(MetisOutput, {key: hint for key, hint in added.items() if not _omitted(hint, "output")}),
    )


def _extended(base: type[Any], added: dict[str, Any]) -> type[Any]:
    hints = {**get_type_hints(base, include_extras=True), **added}
    return TypedDict(base.__name__, hints, total=False)  # type: ignore[operator, no-any-return]


def _omitted(hint: Any, side: str) -> bool:
    """True where langchain's `OmitFromSchema` annotation hides the key; read without needing langchain."""
    while hasattr(hint, "__origin__") and not hasattr(hint, "__metadata__"):
        hint = hint.__args__[0] if hint.__args__ else None
    return any(
        type(mark).__name__ == "OmitFromSchema" and getattr(mark, side, False)
        for mark in getattr(hint, "__metadata__", ())
    )


NODES = ("gate", "act", "answer", "record")
"""Names that no tool can have."""


def build_graph(
    setup: Setup, *, state_schema: type[Any] | None = None, context_schema: type[Any] | None = None
) -> StateGraph[Any, Any, Any, Any]:
    """The agent's graph, not yet compiled.

    Raises:
        ConfigurationError: the state schema does not fit.
    """
    state, input_, output = schemas_with(state_schema)
    graph: StateGraph[Any, Any, Any, Any] = StateGraph(state, context_schema, input_schema=input_, output_schema=output)
    finish = setup.finish
    ends_turn = setup.direct_tools or (setup.rules.gate.gate.wants_draft and bool(setup.tools))
    graph.add_node(
        "gate",
        GateNode(setup),
        input_schema=MetisState,
        destinations=("answer", *(("act",) if setup.tools else ()), *((finish,) if ends_turn else ())),
    )
    graph.add_node("answer", AskingNode(setup, "answer"), input_schema=MetisState, destinations=(finish,))
    graph.add_edge(START, "gate")
    if setup.tools:
        ends = (*setup.tools, "gate", finish)
        graph.add_node("act", AskingNode(setup, "act"), input_schema=MetisState, destinations=ends)
        for name, tool in tool_nodes(setup).items():
            graph.add_node(name, tool)
            graph.add_edge(name, "gate")
    if setup.rules.recorder is not None:
        graph.add_node("record", RecordNode(setup), input_schema=MetisState)
        graph.add_edge("record", END)
    return graph
