"""What an agent is made of, settled when it is created; foremost its chat model in all the forms that it is asked in.

Tools are bound once for each set of allowed ones: binding anew at every turn is slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.messages import AIMessage, AnyMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBinding, RunnableBindingBase, RunnableSequence
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langgraph.constants import TAG_NOSTREAM
from langgraph.prebuilt import ToolCallTransformer

from metis_agent.errors import ConfigurationError
from metis_agent.rules.asking import no_tools_choice
from metis_agent.rules.outcomes import RecordsAsTold
from metis_agent.rules.rules import Offer, Offered, Rules, spec_of

__all__ = ["Bindings", "BoundModel", "Setup", "taken_apart"]

_ONLY_WITH_TOOLS = frozenset({"tool_choice", "parallel_tool_calls", "strict"})


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of one agent, shared by all its nodes."""

    rules: Rules
    models: Bindings
    tools: Mapping[str, BaseTool]
    offer: Offer
    tool_timeout: float | None = None
    """Seconds."""
    system_message: SystemMessage | None = None
    hooks: Any = None
    """Of LangChain's middleware and of an answer's format, where the agent has any."""

    def __post_init__(self) -> None:
        self.rules.gate.gate.check_tools(self.offer.known)

    @property
    def offered(self) -> Offered:
        """What a model call reads beside the conversation, as it is recorded."""
        return {"tools": self.offer.definitions, "system_prompt": self.system_message}

    @cached_property
    def structured(self) -> bool:
        """Whether the answer has a format of its own."""
        return self.hooks is not None and bool(self.hooks.structured)

    @property
    def transformers(self) -> tuple[Any, ...]:
        """What LangGraph's event streams pass through, as in an agent of LangChain's with the same middleware."""
        return (*(self.hooks.transformers if self.hooks is not None else [ToolCallTransformer]), RecordsAsTold)

    @cached_property
    def entry(self) -> str:
        """The node that begins a step."""
        return next(iter(self.hook_nodes("before_model")), "gate")

    @cached_property
    def replied(self) -> str | None:
        """The node after a reply that ends the turn or has calls to run, where there is one before these."""
        return next(iter(self.hook_nodes("after_model")), None)

    @cached_property
    def finish(self) -> str:
        """The node after the turn's end."""
        return next(iter(self.hook_nodes("after_agent")), self.last)

    @property
    def last(self) -> str:
        """The node after all hooks."""
        return "record" if self.rules.recorder is not None else "__end__"

    def hook_nodes(self, *kinds: str) -> dict[str, Runnable[Any, Any]]:
        """The hooks of these kinds that are nodes, by name, in the order in which they run."""
        if self.hooks is None:
            return {}
        return {name: hook for kind in kinds for name, hook in self.hooks.nodes[kind].items()}

    @cached_property
    def direct_tools(self) -> frozenset[str]:
        """Tools whose result ends the turn."""
        return frozenset([name for name, tool in self.tools.items() if tool.return_direct])


class BoundModel:
    """A chat model with what it was bound to.

    A model may have `reply_unheard` and `areply_unheard`, which answer a conversation as `invoke` and `ainvoke` do
    where no callback listens; they are asked where that is so.
    """

    __slots__ = ("_areply", "_config", "_keywords", "_model", "_reply")

    def __init__(self, model: Runnable[Any, Any]) -> None:
        self._model = model
        self._keywords: Mapping[str, Any] = {}
        self._config: RunnableConfig | None = None
        # A binding that holds keywords only does nothing but merge empty configs: 4% of a direct turn.
        if _only_adds_keywords(model):
            self._model, self._keywords = model.bound, model.kwargs
        self._reply = getattr(self._model, "reply_unheard", None)
        self._areply = getattr(self._model, "areply_unheard", None)

    def invoke(self, messages: Sequence[AnyMessage]) -> AIMessage:
        """Ask the model; callbacks and configuration come from the running graph."""
        reply: AIMessage
        if self._reply is not None and _nobody_listens():
            reply = self._reply(messages, **self._keywords)
            return reply
        reply = self._model.invoke(messages, self._config, **self._keywords)
        return reply

    async def ainvoke(self, messages: Sequence[AnyMessage]) -> AIMessage:
        """Ask the model without blocking the event loop."""
        reply: AIMessage
        if self._areply is not None and _nobody_listens():
            reply = await self._areply(messages, **self._keywords)
            return reply
        reply = await self._model.ainvoke(messages, self._config, **self._keywords)
        return reply

    def unseen(self, **keywords: Any) -> BoundModel:
        """The same with further keywords, and with its tokens kept out of `messages` streams."""
        twin = BoundModel(self._model)
        twin._keywords = {**self._keywords, **keywords}
        twin._config = RunnableConfig(tags=[TAG_NOSTREAM])
        return twin


def _nobody_listens() -> bool:
    """Whether the running node has no callback, tracer or stream that would hear of a model call."""
    callbacks = (var_child_runnable_config.get() or {}).get("callbacks")
    return isinstance(callbacks, BaseCallbackManager) and not callbacks.handlers


def _only_adds_keywords(model: Runnable[Any, Any]) -> TypeGuard[RunnableBinding[Any, Any]]:
    return (
        isinstance(model, RunnableBinding)
        and not model.config
        and not model.config_factories
        and all(getattr(type(model), name) is getattr(RunnableBindingBase, name) for name in ("invoke", "ainvoke"))
    )


class Bindings:
    """One chat model in all the forms that an agent asks it in.

    Args:
        model: a chat model.
        tools: all tools of the agent, the model's own too; those that run at the provider are mappings.

    Where the decision is to answer, no tools are offered, unless the conversation holds calls: providers refuse such
    calls beside a request without tools. Then all are offered, and calls of them forbidden where the client can do
    that. A model class that has `offers_tools_when_direct` settles it for itself: always, or never.

    Raises:
        ConfigurationError: the model can't be given tools.
    """

    def __init__(self, model: Runnable[Any, Any], tools: Sequence[BaseTool | Mapping[str, Any]]) -> None:
        self._model, self._settings, _ = taken_apart(model)
        self._tools: dict[str, list[BaseTool | Mapping[str, Any]]] = {}
        for tool in tools:
            self._tools.setdefault(spec_of(tool).name, []).append(tool)
        self._acting: dict[tuple[tuple[str, ...], bool], BoundModel] = {}
        self._drafting: dict[tuple[bool, bool], BoundModel] = {}
        settings = {key: value for key, value in self._settings.items() if key not in _ONLY_WITH_TOOLS}
        inner = self._model.model if isinstance(self._model, _InSequence) else self._model
        self._bare = BoundModel(self._model.bind(**settings) if settings or inner is not self._model else self._model)
        self._keeps = getattr(self._model, "offers_tools_when_direct", None)
        self._no_tools = "none" if self._keeps else no_tools_choice(inner)
        if tools:
            self.acting(tuple(self._tools), required=False)

    def answering(self, messages: Sequence[AnyMessage], *, again: bool = False) -> BoundModel:
        """The model, to answer this conversation without calling anything."""
        if not self._keeps_tools(messages) or (again and self._no_tools is None):
            return self._bare
        return self._forbidden

    def drafting(self, messages: Sequence[AnyMessage], *, log_probs: bool) -> BoundModel:
        """The same for a draft: with log-probabilities where the model has a `logprobs` setting.

        A model that has the setting but can't give them is made with `logprobs=False`; that is left as it is.
        """
        log_probs = log_probs and getattr(self._model, "logprobs", True) is None
        key = (self._keeps_tools(messages), log_probs)
        if key not in self._drafting:
            bound = self.answering(messages)
            self._drafting[key] = bound.unseen(**{"logprobs": True} if log_probs else {})
        return self._drafting[key]

    def acting(self, allowed: tuple[str, ...], *, required: bool) -> BoundModel:
        """The model with these tools; where `required`, it must call one."""
        key = (allowed, required)
        bound = self._acting.get(key)
        if bound is None:
            tools = [tool for name in allowed for tool in self._tools[name]]
            bound = self._acting[key] = self._bind(tools, "any" if required else None)
        return bound

    @cached_property
    def _forbidden(self) -> BoundModel:
        """The model with all tools, and none to be called."""
        return self._bind([tool for tools in self._tools.values() for tool in tools], self._no_tools)

    def _keeps_tools(self, messages: Sequence[AnyMessage]) -> bool:
        if not self._tools:
            return False
        return any(message.type == "tool" for message in messages) if self._keeps is None else bool(self._keeps)

    def _bind(self, tools: Sequence[BaseTool | Mapping[str, Any]], tool_choice: Any) -> BoundModel:
        bind_tools = getattr(self._model, "bind_tools", None)
        settings = {**self._settings, **({"tool_choice": tool_choice} if tool_choice else {})}
        try:
            if bind_tools is None:
                raise NotImplementedError
            return BoundModel(bind_tools(tools, **settings))
        except NotImplementedError as error:
            raise ConfigurationError(
                f"{type(self._model).__name__} can't be given tools: it does not implement bind_tools. "
                "Use a chat model with tool calling, or an agent without tools."
            ) from error


class _InSequence:
    """A chat model with what goes before and after it."""

    logprobs = False
    """Settings of a call reach a sequence's first step only."""

    def __init__(self, before: Sequence[Any], model: Any, after: Sequence[Any]) -> None:
        self._before, self.model, self._after = before, model, after
        self.offers_tools_when_direct = getattr(model, "offers_tools_when_direct", None)

    def bind(self, **settings: Any) -> Runnable[Any, Any]:
        """The sequence with the chat model bound to these settings."""
        model = self.model.bind(**settings) if settings else self.model
        return RunnableSequence(*self._before, model, *self._after)

    def bind_tools(self, tools: Sequence[Any], **settings: Any) -> Runnable[Any, Any]:
        """The sequence with the chat model bound to these tools."""
        return RunnableSequence(*self._before, self.model.bind_tools(tools, **settings), *self._after)


def taken_apart(model: Any) -> tuple[Any, dict[str, Any], Sequence[Mapping[str, Any]]]:
    """A model, the settings that it was bound to, and the tools among them.

    To bind tools to a model that was bound before is to lose what it was bound to. In a sequence (a supervisor names
    its workers in messages so) it is the chat model that is bound.
    """
    if isinstance(model, RunnableSequence):
        place = next((at for at, step in enumerate(model.steps) if hasattr(taken_apart(step)[0], "bind_tools")), None)
        if place is None:
            return model, {}, ()
        inner, settings, tools = taken_apart(model.steps[place])
        return _InSequence(model.steps[:place], inner, model.steps[place + 1 :]), settings, tools
    if not isinstance(model, RunnableBinding) or model.config_factories or not hasattr(model.bound, "bind_tools"):
        return model, {}, ()
    settings = dict(model.kwargs)
    tools = settings.pop("tools", None) or ()
    if not tools:
        settings.pop("tool_choice", None)
    inner = model.bound.with_config(model.config) if model.config else model.bound
    return inner, settings, [part for tool in tools if isinstance(tool, Mapping) for part in _parts(tool)]


def _parts(tool: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The tools in one that a model was bound to: Gemini's client binds many as one, with keys for all kinds."""
    if "function_declarations" not in tool:
        yield tool
        return
    yield from tool["function_declarations"] or ()
    for kind, settings in tool.items():
        if settings is None or kind == "function_declarations":
            continue
        if isinstance(settings, Mapping):
            settings = {key: value for key, value in settings.items() if value is not None}
        yield {kind: settings}
