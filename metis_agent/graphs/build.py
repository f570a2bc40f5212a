"""Wiring, and nothing else: START -> gate -> (answer | act); act -> one node per tool -> gate; then END."""

from __future__ import annotations

from typing import Any

from langgraph.graph import END, START, StateGraph

from metis_agent.graphs.models import Setup
from metis_agent.graphs.nodes import AskingNode, GateNode, RecordNode
from metis_agent.graphs.state import MetisState, schemas_with
from metis_agent.graphs.tool_nodes import tool_nodes

__all__ = ["NODES", "build_graph"]

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
