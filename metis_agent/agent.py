"""The agent: a compiled LangGraph whose every turn passes a gate, *answer directly or call a tool*.

`create_metis_agent` takes the keywords of `langchain.agents.create_agent` and a few of its own. What it
returns is a `CompiledStateGraph` in every respect: streams, checkpointers, interrupts, a node in other graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import (
    DEFAULT_RECURSION_LIMIT,
    ensure_config,
    get_async_callback_manager_for_config,
    merge_configs,
)
from langchain_core.tools import BaseTool
from langchain_core.tools import tool as as_tool
from langgraph.cache.base import BaseCache
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.store.base import BaseStore
from langgraph.types import All, Checkpointer, GraphOutput, StateUpdate

from metis_agent.errors import ConfigurationError, MissingDependencyError, UnknownToolError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate
from metis_agent.gates.reference import ModelGate
from metis_agent.graphs.build import NODES, MetisState, build_graph, is_straight, run_nodes, way_on
from metis_agent.graphs.models import Bindings, Setup, taken_apart
from metis_agent.recording.recorder import Recorder
from metis_agent.rules.asking import AskedGate
from metis_agent.rules.budget import Budget, ToolTerms, terms_of
from metis_agent.rules.rules import DEFAULT_BLOCK_MESSAGE, Offer, Rules, check_seconds, is_function, spec_of

if TYPE_CHECKING:
    _Graph = CompiledStateGraph[Any, Any, Any, Any]
else:
    _Graph = CompiledStateGraph

__all__ = ["DEFAULT_BLOCK_MESSAGE", "MetisAgent", "create_metis_agent"]


class MetisAgent(_Graph):
    """A compiled graph that knows its gate, tools and budget. Made by `create_metis_agent`."""

    def __init__(self, *, metis: Setup | None = None, **keywords: Any) -> None:
        # `copy`, and with it `with_config`, calls this again with everything in `__dict__`.
        super().__init__(**keywords)
        self.metis = metis

    def invoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stream_mode: Any = "values",
        version: Literal["v1", "v2"] = "v1",
        **keywords: Any,
    ) -> Any:
        """Run the graph, as `CompiledStateGraph.invoke` does."""
        # The same result, cheaper: in v2 interrupts come with the values, in v1 by a second stream beside them.
        if stream_mode != "values" or version != "v1":
            return super().invoke(input, config, stream_mode=stream_mode, version=version, **keywords)
        return _as_v1(super().invoke(input, config, version="v2", **keywords))

    async def ainvoke(
        self,
        input: Any,
        config: RunnableConfig | None = None,
        *,
        stream_mode: Any = "values",
        version: Literal["v1", "v2"] = "v1",
        **keywords: Any,
    ) -> Any:
        """Run the graph, as `CompiledStateGraph.ainvoke` does."""
        if stream_mode != "values" or version != "v1":
            return await super().ainvoke(input, config, stream_mode=stream_mode, version=version, **keywords)
        return _as_v1(await super().ainvoke(input, config, version="v2", **keywords))

    async def aresult(self, input: Mapping[str, Any], config: RunnableConfig | None = None) -> Any:
        """What `ainvoke` gives, in less time where nothing else of the run is wanted: for rollouts by the hundred.

        The same nodes run without LangGraph's engine where the agent has no checkpointer, recorder, interrupts,
        middleware, cache or state of its own, its tools take arguments only, and no callback or tracer listens.
        """
        config = ensure_config(merge_configs(self.config, config))
        straight = type(self).ainvoke is MetisAgent.ainvoke and is_straight(self._setup, self)
        if straight and not get_async_callback_manager_for_config(config).handlers:
            return await run_nodes(self, input, config)
        return await self.ainvoke(input, config)

    def stream(self, input: Any, config: RunnableConfig | None = None, **keywords: Any) -> Any:
        """Stream the graph, as `CompiledStateGraph.stream` does."""
        return super().stream(input, self._limited(config), **keywords)

    def astream(self, input: Any, config: RunnableConfig | None = None, **keywords: Any) -> Any:
        """Stream the graph, as `CompiledStateGraph.astream` does."""
        return super().astream(input, self._limited(config), **keywords)

    def bulk_update_state(self, config: RunnableConfig, supersteps: Sequence[Sequence[StateUpdate]]) -> RunnableConfig:
        """Update the state, as `CompiledStateGraph.bulk_update_state` does; the run goes on from what it then is."""
        if not supersteps or self._is_of_subgraph(config):
            return super().bulk_update_state(config, supersteps)
        for updates in supersteps:
            if len(updates) == 1:
                now = self.get_state(config)
                # As it is stored: without what tools beside one that waits have already brought.
                updates = [way_on(self._setup, self.get_state(now.config) if now.next else now, updates[0])]
            config = super().bulk_update_state(config, [updates])
        return config

    async def abulk_update_state(
        self, config: RunnableConfig, supersteps: Sequence[Sequence[StateUpdate]]
    ) -> RunnableConfig:
        """Update the state, as `CompiledStateGraph.abulk_update_state` does; the run goes on from what it then is."""
        if not supersteps or self._is_of_subgraph(config):
            return await super().abulk_update_state(config, supersteps)
        for updates in supersteps:
            if len(updates) == 1:
                now = await self.aget_state(config)
                updates = [way_on(self._setup, await self.aget_state(now.config) if now.next else now, updates[0])]
            config = await super().abulk_update_state(config, [updates])
        return config

    def _is_of_subgraph(self, config: RunnableConfig) -> bool:
        """Whether the configuration names a graph within this one, which then updates itself."""
        configurable = config.get("configurable", {})
        return bool(configurable.get("checkpoint_ns")) and "__pregel_checkpointer" not in configurable

    def _limited(self, config: RunnableConfig | None) -> RunnableConfig | None:
        """The configuration with the agent's own limit where LangChain has filled in its default, as a pipe does."""
        own = (self.config or {}).get("recursion_limit")
        if config is None or own is None or config.get("recursion_limit") != DEFAULT_RECURSION_LIMIT:
            return config
        return {**config, "recursion_limit": max(own, DEFAULT_RECURSION_LIMIT)}

    def with_gate(self, gate: Gate | SupportsDecide) -> MetisAgent:
        """The same model, tools and budget behind another gate, for rollouts and trials.

        It records nothing and keeps no threads: recorder, checkpointer and interrupts are left behind.
        """
        own, other = self._setup, as_gate(gate)
        asked = AskedGate(other, own.rules.gate.limit)
        rules = replace(own.rules, gate=asked, recorder=None, record_calls=True)
        setup = replace(own, rules=rules, offer=own.offer.under(rules))
        schemas = self.builder.state_schema, self.builder.context_schema
        graph = build_graph(setup, state_schema=schemas[0], context_schema=schemas[1])
        return _compiled(setup, graph, store=self.store, cache=self.cache, name=self.name)

    @property
    def gate(self) -> Gate:
        """What decides at every step."""
        return self._setup.rules.gate.gate

    @property
    def tools(self) -> Mapping[str, BaseTool]:
        """The tools by name."""
        return self._setup.tools

    @property
    def budget(self) -> Budget:
        """What one turn may spend."""
        return self._setup.rules.budget

    @property
    def _setup(self) -> Setup:
        if self.metis is None:
            raise ConfigurationError("This MetisAgent has no setup: None. Make it by create_metis_agent.")
        return self.metis


def create_metis_agent(
    model: str | BaseChatModel,
    tools: Sequence[BaseTool | Callable[..., Any] | dict[str, Any]] | None = (),
    *,
    gate: Gate | SupportsDecide | None = None,
    budget: Budget | None = None,
    recorder: Recorder | None = None,
    tool_timeout: float | None = 60.0,
    gate_timeout: float | None = None,
    block_message: str = DEFAULT_BLOCK_MESSAGE,
    record_calls: bool | None = None,
    ungated: Collection[str] = (),
    never: Collection[str] = (),
    always: Collection[str] = (),
    system_prompt: str | SystemMessage | None = None,
    middleware: Sequence[Any] = (),
    response_format: Any = None,
    state_schema: type[Any] | None = None,
    context_schema: type[Any] | None = None,
    checkpointer: Checkpointer | None = None,
    store: BaseStore | None = None,
    interrupt_before: All | list[str] | None = None,
    interrupt_after: All | list[str] | None = None,
    debug: bool = False,
    name: str | None = None,
    cache: BaseCache[Any] | None = None,
) -> MetisAgent:
    """Make an agent.

    Args:
        model: a chat model, or a string for LangChain's `init_chat_model` (needs the extra `langchain`).
        tools: LangChain tools, or functions to make tools of. Each gets a node of its name. A tool may
            declare `metadata={"cost": 0.02, "repeatable": True}`. A dict is a tool that runs at the model's provider,
            as its client takes it: it is offered where the gate allows it, and its calls are counted and recorded.
        gate: decides at every step whether a tool may be called; by default the model decides.
        budget: what one turn may spend; by default 8 tool calls.
        recorder: writes every turn to a trajectory store, in a node of its own.
        tool_timeout: seconds that a tool call may take; `None` for no limit.
        gate_timeout: seconds that a decision may take, a draft not counted; after that, as after any failure of
            the gate, the model decides and the decision's reason says so. `None` for no limit.
        block_message: what the model reads instead of the result of a call that was not run; a format
            string with the fields `{tool}` and `{reason}`.
        record_calls: keep each turn's model calls in `calls`; by default where there is a recorder, or where
            the model leaves token records.
        ungated: names of tools that are the model's to decide, as those are that the gate does not know.
        never: names of tools that are never offered and never run.
        always: names of tools that stay on offer whatever the gate decides.
        system_prompt: goes before the conversation at every model call.
        middleware: as in `create_agent` (needs the extra `langchain`): its hooks run around the same model calls, tool
            calls and turns, its tools are behind the gate, and what it does to the tools on offer is enforced.
        response_format: as in `create_agent` (needs the extra `langchain`): the answer is in `structured_response`.
        state_schema: a `TypedDict` with further state fields, for tools that read or update them.
        context_schema: as in `create_agent`.
        checkpointer: as in `create_agent`.
        store: as in `create_agent`.
        interrupt_before: names of nodes (tools are nodes) to stop before.
        interrupt_after: names of nodes to stop after.
        debug: as in `create_agent`.
        name: names the graph and the model's messages.
        cache: as in `create_agent`.

    Returns:
        An agent that takes `{"messages": [...]}` and gives `messages`, and for the latest turn `decisions`,
        `outcomes` and `calls`.

    Raises:
        ConfigurationError: an argument can't be used; found before anything runs.
        UnknownToolError: the budget or one of the lists names a tool that is not among the tools.
        MissingDependencyError: a model is named by a string, and `langchain` is not installed.

    Example:
        >>> from metis_agent.agent import create_metis_agent
        >>> agent = create_metis_agent(my_chat_model, [search], budget=Budget(calls=3))  # doctest: +SKIP
        >>> agent.invoke({"messages": [{"role": "user", "content": "hi"}]})  # doctest: +SKIP
    """
    chat = _chat_model(model)
    tools = [*(tools or ()), *[tool for one in middleware for tool in getattr(one, "tools", ())]]
    inner, settings, with_it = taken_apart(chat)
    by_name = _by_name([tool for tool in tools or () if not isinstance(tool, Mapping)])
    _check_bound(with_it, by_name)
    # Several of one name are several servers, or stores to search in.
    given: list[Mapping[str, Any]] = [tool for tool in tools or () if isinstance(tool, Mapping)]
    given = [tool for place, tool in enumerate(given) if tool not in given[:place]]
    given = [*_not_named(with_it, map(_name_of, given)), *given]
    remote = _not_named(given, by_name)
    names = [*dict.fromkeys(map(_name_of, remote)), *by_name]
    budget = budget or Budget()
    budget.check_tools(names)
    for option, named in (("ungated", ungated), ("never", never), ("always", always)):
        _check_named(option, named, names)
    check_seconds("tool_timeout", tool_timeout)
    check_seconds("gate_timeout", gate_timeout)
    own = ModelGate() if gate is None else as_gate(gate)
    rules = Rules(
        gate=AskedGate(own, gate_timeout),
        budget=budget,
        block_message=block_message,
        recorder=recorder,
        record_calls=True if recorder is not None and record_calls is None else record_calls,
        name=name,
        ungated=frozenset(ungated),
        never=frozenset(never),
        always=frozenset(always),
    )
    every: list[BaseTool | Mapping[str, Any]] = [*remote, *by_name.values()]
    terms = {name: terms_of(by_name[name]) if name in by_name else ToolTerms() for name in names}
    specs = {_name_of(tool): spec_of(tool) for tool in every}
    if not isinstance(system_prompt, str | SystemMessage | None):
        raise ConfigurationError(
            f"system_prompt is {system_prompt!r}; it must be a string or a SystemMessage. For one that depends on the "
            "conversation, pass LangChain's `dynamic_prompt` as middleware."
        )
    system_message = SystemMessage(system_prompt) if isinstance(system_prompt, str) else system_prompt
    hooks = None
    if middleware or response_format is not None:
        from metis_agent.middleware.gate import Hooks

        hooks = Hooks(
            inner, settings, every, middleware=middleware, response_format=response_format,
            system_message=system_message, state_schema=state_schema, context_schema=context_schema,
        )  # fmt: skip
        state_schema = hooks.state_schema
    setup = Setup(
        rules=rules,
        models=Bindings(chat, every),
        tools=by_name,
        offer=Offer(list(specs.values()), terms, rules, [name for name in names if name not in by_name], tools=every),
        tool_timeout=tool_timeout,
        system_message=system_message,
        hooks=hooks,
    )
    return _compiled(
        setup,
        build_graph(setup, state_schema=state_schema, context_schema=context_schema),
        checkpointer=checkpointer,
        store=store,
        interrupt_before=interrupt_before,
        interrupt_after=interrupt_after,
        debug=debug,
        name=name,
        cache=cache,
    )


_ONCE = ("before_agent", "after_agent")


def _compiled(setup: Setup, graph: StateGraph[Any, Any, Any, Any], **options: Any) -> MetisAgent:
    compiled = graph.compile(transformers=setup.transformers, **options)
    parts = {key: value for key, value in vars(compiled).items() if key != "__orig_class__"}
    looped, once = len(setup.hook_nodes("before_model", "after_model")), len(setup.hook_nodes(*_ONCE))
    parts["config"] = {"recursion_limit": setup.rules.budget.max_steps * (1 + looped) + once}
    return MetisAgent(metis=setup, **parts)


def _as_v1(output: GraphOutput[Any]) -> Any:
    if not output.interrupts:
        return output.value
    value = output.value if isinstance(output.value, dict) else {}
    return {**value, "__interrupt__": list(output.interrupts)}


def _name_of(tool: BaseTool | Mapping[str, Any]) -> str:
    return spec_of(tool).name


def _not_named(tools: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[Mapping[str, Any]]:
    taken = set(names)
    return [tool for tool in tools if _name_of(tool) not in taken]


def _by_name(tools: Sequence[BaseTool | Callable[..., Any]]) -> dict[str, BaseTool]:
    taken = {*NODES, *MetisState.__annotations__}
    by_name: dict[str, BaseTool] = {}
    for candidate in tools:
        if not isinstance(candidate, BaseTool) and not callable(candidate):
            raise ConfigurationError(
                f"{candidate!r} is no tool: pass LangChain tools, functions, or, for tools that run at the model's "
                "provider, the dicts that its client takes."
            )
        tool = candidate if isinstance(candidate, BaseTool) else as_tool(candidate)
        if tool.name in taken or any(mark in tool.name for mark in "|:") or tool.name.startswith("__"):
            raise ConfigurationError(
                f"A tool is named {tool.name!r}; tools are nodes of the graph, so their names can't be one of "
                f"{sorted(taken)}, hold '|' or ':', or start with '__'. Rename it."
            )
        if tool.name in by_name:
            raise ConfigurationError(f"Two tools are named {tool.name!r}; names must differ. Rename one.")
        by_name[tool.name] = tool
    return by_name


def _check_bound(bound: Sequence[Mapping[str, Any]], tools: Collection[str]) -> None:
    """Refuse a model that was bound to other functions than the agent runs."""
    names = {_name_of(tool) for tool in bound if is_function(tool)}
    if names and names != set(tools):
        raise ConfigurationError(
            f"The model was bound to the functions {sorted(names)!r}, and the agent's tools are {sorted(tools)!r}. "
            "Pass the same tools, or the model as it was before `bind_tools`."
        )


def _check_named(option: str, named: Collection[str], tools: Collection[str]) -> None:
    if isinstance(named, str) or (unknown := sorted(set(named) - set(tools))):
        what = named if isinstance(named, str) else unknown
        raise UnknownToolError(
            f"{option} is to be a collection of names of the agent's tools, {sorted(tools)!r}, and has {what!r}. "
            "Use one of these names."
        )


def _chat_model(model: str | BaseChatModel) -> Runnable[Any, Any]:
    if isinstance(model, Runnable):
        return model
    if not isinstance(model, str):
        raise ConfigurationError(f"model is {model!r}; it must be a chat model, or a string such as 'openai:...'.")
    try:
        from langchain.chat_models import init_chat_model
    except ImportError as error:
        raise MissingDependencyError(
            f"The model is named by a string, {model!r}, which needs LangChain's init_chat_model. "
            "Install it with `pip install 'langgraph-metis[langchain]'`, or pass a chat model."
        ) from error
    named: Runnable[Any, Any] = init_chat_model(model)
    return named
