"""What an agent is made of, settled when it is created; foremost its chat model in all the forms that it is asked in.

Tools are bound once for each set of allowed ones: binding anew at every turn is slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.messages import AIMessage, AnyMessage, SystemMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.base import RunnableBinding, RunnableBindingBase
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langgraph.constants import TAG_NOSTREAM

from metis_agent.errors import ConfigurationError
from metis_agent.rules.rules import Offer, Rules

__all__ = ["Bindings", "BoundModel", "Setup"]


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

    def __post_init__(self) -> None:
        self.rules.gate.gate.check_tools(self.offer.specs)

    @cached_property
    def finish(self) -> str:
        """The node after the turn's end."""
        return "record" if self.rules.recorder is not None else "__end__"

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
        tools: all tools of the agent.

    A model class with `offers_tools_when_direct = True` is offered all tools with `tool_choice="none"` when the
    decision is to answer, so that its prompt stays the same token for token; other models are offered none.

    Raises:
        ConfigurationError: the model can't be given tools.
    """

    def __init__(self, model: Runnable[Any, Any], tools: Sequence[BaseTool]) -> None:
        self._model = model
        self._tools = {tool.name: tool for tool in tools}
        self._acting: dict[tuple[tuple[str, ...], bool], BoundModel] = {}
        self.answering = BoundModel(model)
        if tools:
            self.acting(tuple(self._tools), required=False)
            if getattr(model, "offers_tools_when_direct", False):
                self.answering = self._bind(list(self._tools.values()), "none")

    @cached_property
    def drafting(self) -> BoundModel:
        """The model as it answers, for a draft: with log-probabilities where it has a `logprobs` setting.

        A model that has the setting but can't give them is made with `logprobs=False`; that is left as it is.
        """
        asks = getattr(self._model, "logprobs", True) is None
        return self.answering.unseen(**{"logprobs": True} if asks else {})

    def acting(self, allowed: tuple[str, ...], *, required: bool) -> BoundModel:
        """The model with these tools; where `required`, it must call one."""
        key = (allowed, required)
        bound = self._acting.get(key)
        if bound is None:
            tools = [self._tools[name] for name in allowed]
            bound = self._acting[key] = self._bind(tools, "any" if required else None)
        return bound

    def _bind(self, tools: Sequence[BaseTool], tool_choice: str | None) -> BoundModel:
        bind_tools = getattr(self._model, "bind_tools", None)
        try:
            if bind_tools is None:
                raise NotImplementedError
            return BoundModel(bind_tools(tools, tool_choice=tool_choice) if tool_choice else bind_tools(tools))
        except NotImplementedError as error:
            raise ConfigurationError(
                f"{type(self._model).__name__} can't be given tools: it does not implement bind_tools. "
                "Use a chat model with tool calling, or an agent without tools."
            ) from error
