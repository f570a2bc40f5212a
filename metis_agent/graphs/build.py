"""The graph's state and its wiring: START -> gate -> (answer | act); act -> one node per tool -> gate; then END.

The state holds what comes in, what goes out, and what the nodes keep between them. `decisions`, `outcomes` and `calls`
describe the latest turn; the gate node clears them when a new turn begins. History is the trajectory store's business.
The nodes say where a run goes next. Where a person has changed the state of a run that stands still, `way_on` says it.

`run_nodes` goes the same way without LangGraph's engine, for rollouts: nearly half of their Python time goes into that,
for checkpoints, streams and callbacks that they do not have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Required, get_type_hints

from langchain_core.callbacks import AsyncCallbackManager
from langchain_core.messages import AIMessage, AnyMessage, RemoveMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import GraphInterrupt, GraphRecursionError, ParentCommand
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.graph.state import CompiledStateGraph
from langgraph.managed.base import is_managed_value
from langgraph.runtime import DEFAULT_RUNTIME
from langgraph.types import Command, Send, StateSnapshot, StateUpdate
from typing_extensions import TypedDict, is_typeddict

from metis_agent.errors import ConfigurationError
from metis_agent.graphs.models import Setup
from metis_agent.graphs.nodes import AskingNode, GateNode, RecordNode, is_plain_node, tool_nodes
from metis_agent.rules.asking import SentCall
from metis_agent.rules.outcomes import as_left
from metis_agent.rules.shapes import open_calls
from metis_agent.rules.state import Latest, Notes, Records, RunMarker, begins_anew
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = [
    "NODES",
    "MetisInput",
    "MetisOutput",
    "MetisState",
    "build_graph",
    "is_straight",
    "run_nodes",
    "schemas_with",
    "way_on",
]


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

    metis_turn: Annotated[Notes, Latest]
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
    """True where langchain's `OmitFromSchema` hides the key (read without needing langchain), or LangGraph gives it."""
    while hasattr(hint, "__origin__") and not hasattr(hint, "__metadata__"):
        hint = hint.__args__[0] if hint.__args__ else None
    return any(
        is_managed_value(mark) or (type(mark).__name__ == "OmitFromSchema" and getattr(mark, side, False))
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
    # Hooks may want to read all that there is.
    read, ended = MetisState if setup.hooks is None else state, setup.replied or setup.finish
    ends_turn = (
        setup.direct_tools or setup.structured or (setup.rules.gate.gate.wants_draft and bool(setup.offer.every))
    )
    graph.add_node(
        "gate",
        GateNode(setup),
        input_schema=read,
        destinations=("answer", *(("act",) if setup.offer.every else ()), *((ended,) if ends_turn else ())),
    )
    graph.add_node("answer", AskingNode(setup, "answer"), input_schema=read, destinations=(ended,))
    if setup.offer.every:
        sent = setup.tools if setup.replied is None else ()
        graph.add_node("act", AskingNode(setup, "act"), input_schema=read, destinations=(*sent, setup.entry, ended))
        for name, tool in tool_nodes(setup).items() if setup.tools else ():
            graph.add_node(name, tool)
            graph.add_edge(name, setup.entry)
    if setup.rules.recorder is not None:
        graph.add_node("record", RecordNode(setup), input_schema=MetisState)
        graph.add_edge("record", END)
    graph.add_edge(START, next(iter(setup.hook_nodes(*_OPENING)), "gate"))
    following = _following(setup)
    for name, hook in setup.hook_nodes(*_OPENING, "after_model", "after_agent").items():
        ends = (following[name],) if name in following else (*setup.tools, setup.entry, setup.finish)
        graph.add_node(name, _HookNode(setup, name, hook, following.get(name)), input_schema=state, destinations=ends)
    return graph


_OPENING = ("before_agent", "before_model")


def _following(setup: Setup) -> dict[str, str]:
    """The node after each hook, but for the last one of a reply: that is for the conversation to say."""
    opening, closing = [*setup.hook_nodes(*_OPENING), "gate"], [*setup.hook_nodes("after_agent"), setup.last]
    return dict(pairwise(opening)) | dict(pairwise(setup.hook_nodes("after_model"))) | dict(pairwise(closing))


class _HookNode(Runnable[Mapping[str, Any], Command[Any]]):
    """A hook of LangChain's middleware; after the last one of a reply, its calls go to their tools.

    Args:
        setup: the agent's.
        name: the node's.
        hook: LangChain's node.
        following: the node that comes next; `None` where that is for the conversation to say.
    """

    def __init__(self, setup: Setup, name: str, hook: Runnable[Any, Any], following: str | None) -> None:
        self.name = name
        self._setup = setup
        self._hook = hook
        self._following = following

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Run the hook."""
        return self._on(input, self._hook.invoke(input, config))

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Run the hook without blocking the event loop."""
        return self._on(input, await self._hook.ainvoke(input, config))

    def _on(self, state: Mapping[str, Any], result: Any) -> Command[Any]:
        command = result if isinstance(result, Command) else Command(update=result or {})
        update, goto = dict(command.update or {}), command.goto
        jump = update.pop("jump_to", None)
        if isinstance(said := update.get("messages"), list):
            update["messages"] = _without_second_results(state.get("messages", []), said)
            update |= as_left(state, _joined(state, update))
        if not goto or jump in _JUMPS:
            goto = _after_hook(self._setup, self._following, state, _joined(state, update), jump)
        return Command(update=update, goto=goto)


_JUMPS = ("end", "model")


def _after_hook(
    setup: Setup, following: str | None, state: Mapping[str, Any], messages: Sequence[AnyMessage], jump: str | None
) -> Any:
    """Where a run goes on after a hook, which may have asked for a jump."""
    if jump in _JUMPS:
        return setup.finish if jump == "end" else setup.entry
    if jump is None and following is not None:
        return following
    notes: Notes | None = state.get("metis_turn")
    over = jump is None and notes is not None and not notes["open"]
    return setup.finish if over else _after("act", setup, state, messages)


def way_on(setup: Setup, now: StateSnapshot, update: StateUpdate) -> StateUpdate:
    """The update of a state that a person makes, as the node that it is made as would have written it.

    Our nodes say where to go in what they return. LangGraph asks no node when a state is updated, so without this the
    run would end there. Where no node is named, it is the one that the run has just left.

    Args:
        setup: the agent's.
        now: the state before the update.
        update: as `update_state` takes it.
    """
    node = update.as_node or _left(setup, now) or ""
    is_hook = node in setup.hook_nodes(*_OPENING, "after_model", "after_agent")
    if not (is_hook or node in ("gate", "act", "answer")) or not isinstance(update.values, Mapping | None):
        return update
    # Without values it is a copy of the place, to go on from.
    values = dict(update.values or {})
    messages = _joined(now.values, values)
    if is_hook:
        jump = values.pop("jump_to", None)
        goto = _after_hook(setup, _following(setup).get(node), {**now.values, **values}, messages, jump)
    else:
        known = {message.id for message in now.values.get("messages", [])}
        answered = bool(messages) and isinstance(messages[-1], AIMessage) and messages[-1].id not in known
        ends = answered and node != "act"
        goto = setup.finish if ends else _after(node, setup, {**now.values, **values}, messages)
        if node == "act" and setup.replied and (isinstance(goto, list) or goto == setup.finish):
            goto = setup.replied
    made: Any = Command(update=values, goto=goto)
    return update._replace(values=made, as_node=node)


def _joined(state: Mapping[str, Any], update: Mapping[str, Any]) -> Sequence[AnyMessage]:
    """The conversation after an update."""
    messages: Any = state.get("messages", [])
    return add_messages(messages, update["messages"]) if update.get("messages") else messages  # type: ignore[return-value]


def _left(setup: Setup, now: StateSnapshot) -> str | None:
    """The node that a run which stands still has left last; `None` where LangGraph knows that well enough."""
    waiting, notes = set(now.next), now.values.get("metis_turn")
    if waiting & {"act", "answer"}:
        return "gate"
    if waiting & set(setup.tools):
        return next(reversed(setup.hook_nodes("after_model")), "act")
    for hook, following in _following(setup).items():
        if following in waiting and following != setup.entry:
            return hook
    if setup.replied in waiting:
        return "act"
    if waiting == {setup.finish}:
        return "answer"
    if setup.entry not in waiting:
        return None
    if notes is not None and not begins_anew(notes, now.values["messages"]):
        # The tools have run: where they ran side by side, LangGraph can't tell which was last.
        return "act"
    return next(reversed(setup.hook_nodes("before_agent")), None)


def _latest(messages: Sequence[AnyMessage]) -> tuple[AIMessage | None, list[ToolMessage]]:
    """The model's latest reply, and the results after it."""
    results: list[ToolMessage] = []
    for message in reversed(messages):
        if isinstance(message, AIMessage):
            return message, results
        if isinstance(message, ToolMessage):
            results.append(message)
    return None, results


def _without_second_results(messages: Sequence[AnyMessage], said: Sequence[Any]) -> list[Any]:
    """What a hook adds to the conversation, but for results of calls that the rules have answered already."""
    reply, results = _latest(messages)
    known = {result.tool_call_id: result.id for result in results}
    if reply is None or any(isinstance(one, RemoveMessage) for one in said):
        return list(said)
    return [one for one in said if not isinstance(one, ToolMessage) or known.get(one.tool_call_id, one.id) == one.id]


def _after(node: str, setup: Setup, state: Mapping[str, Any], messages: Sequence[AnyMessage]) -> Any:
    """Where a run goes on after this node, by what is in its state."""
    notes: Notes | None = state.get("metis_turn")
    last = messages[-1] if messages else None
    if node == "answer":
        return setup.finish
    if node == "gate":
        if notes is None or begins_anew(notes, messages) or not state.get("decisions"):
            return setup.entry
        return "act" if state["decisions"][-1].allowed else "answer"
    message, results = _latest(messages)
    if message is None:
        return setup.entry
    sent, calls = [], open_calls(message, {result.tool_call_id for result in results})
    for call in calls:
        if call["name"] in setup.tools and call["name"] not in setup.rules.never and isinstance(call["args"], dict):
            call = SentCall(name=call["name"], args=call["args"], id=call["id"], type="tool_call")
            sent.append(Send(call["name"], [call]))
    return sent or (setup.finish if last is message and not calls else setup.entry)


def is_straight(setup: Setup, graph: CompiledStateGraph[Any, Any, Any, Any]) -> bool:
    """Whether a run of this graph is nothing but its nodes: nothing is kept, stopped for, tried again or hooked in."""
    nodes = graph.builder.nodes
    return (
        setup.hooks is None
        and setup.rules.recorder is None
        and graph.builder.state_schema is MetisState
        and not (graph.checkpointer or graph.cache or graph.debug or graph.step_timeout or graph.retry_policy)
        and not (graph.interrupt_before_nodes or graph.interrupt_after_nodes)
        and all(is_plain_node(nodes[name].runnable) for name in setup.tools)
    )


class _NoPause:
    """In the place of what `interrupt` reads: nobody is there to answer, so the run ends where it asks."""

    def __getattr__(self, name: str) -> Any:
        raise GraphInterrupt


_NO_PAUSE = _NoPause()


async def run_nodes(
    graph: CompiledStateGraph[Any, Any, Any, Any], input: Mapping[str, Any], config: RunnableConfig
) -> dict[str, Any]:
    """What a run of a graph that `is_straight` gives: its nodes in turn, each step's writes in the channels.

    Args:
        graph: an agent's.
        input: as the graph takes it.
        config: with all keys, and without callbacks.

    Raises:
        GraphRecursionError: the run takes more steps than its configuration allows.
    """
    nodes, entry = graph.builder.nodes, next(target for source, target in graph.builder.edges if source == START)
    specs: Mapping[str, Any] = graph.channels
    channels = {key: specs[key].copy() for key in graph.builder.channels}
    for key, value in input.items():
        channels[key].update([value])
    given = {"__pregel_runtime": DEFAULT_RUNTIME.override(store=graph.store), "__pregel_scratchpad": _NO_PAUSE}
    config = {**config, "callbacks": AsyncCallbackManager([]), "configurable": {**config["configurable"], **given}}
    token, due = var_child_runnable_config.set(config), [Send(entry, None)]
    try:
        for _ in range(config["recursion_limit"]):
            results = await _run(nodes, channels, due, config)
            due = _take(graph, channels, due, results)
            if not due or None in results:
                break
        else:
            raise GraphRecursionError(f"No end within {config['recursion_limit']} steps; see `recursion_limit`.")
    finally:
        var_child_runnable_config.reset(token)
    return {key: channels[key].get() for key in graph.output_channels if channels[key].is_available()}


async def _run(nodes: Mapping[str, Any], channels: Mapping[str, Any], due: Sequence[Send], config: Any) -> list[Any]:
    """Run the nodes of one step, side by side; a node that was sent nothing reads the state. `None`: it has paused."""
    state = {key: channel.get() for key, channel in channels.items() if channel.is_available()}
    runs = [_unless_paused(nodes[send.node].runnable.ainvoke(send.arg or state, config)) for send in due]
    if len(runs) == 1:
        return [await runs[0]]
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _unless_paused(run: Awaitable[Any]) -> Any:
    try:
        return await run
    except GraphInterrupt:
        return None


def _take(
    graph: CompiledStateGraph[Any, Any, Any, Any], channels: Mapping[str, Any], ran: Sequence[Send],
    results: Sequence[Any],
) -> list[Send]:  # fmt: skip
    """Write a step's results to the channels, and say what is to run next."""
    writes: dict[str, list[Any]] = {}
    following: dict[str, None] = {}
    sent: list[Send] = []
    for send, result in zip(ran, results, strict=True):
        following |= {target: None for source, target in graph.builder.edges if source == send.node}
        for command in result if isinstance(result, list) else [result] if result else []:
            if command.graph == Command.PARENT:
                raise ParentCommand(command)
            for key, value in dict(command.update or {}).items():
                if key in channels:
                    writes.setdefault(key, []).append(value)
            for target in [command.goto] if isinstance(command.goto, str | Send) else command.goto:
                if isinstance(target, Send):
                    sent.append(target)
                else:
                    following[target] = None
    for key, values in writes.items():
        channels[key].update(values)
    return [*sent, *[Send(target, None) for target in following if target != END]]
