"""LangChain's middleware and structured answers in our own graph.

`create_agent` makes the parts: a node that asks the model, within every `wrap_model_call` hook and in the answer's
format, and a node for each hook that is one. The graph asks through the first and is wired with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import reduce
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware.types import AgentMiddleware, ModelRequest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.types import Command

from metis_agent.errors import ConfigurationError
from metis_agent.middleware.gate import MetisGateMiddleware
from metis_agent.middleware.requests import asking
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, Reply
from metis_agent.rules.turn import Turn

__all__ = ["Hooks"]

_wanted: ContextVar[Ask] = ContextVar("metis_wanted")
_KINDS = ("before_agent", "before_model", "after_model", "after_agent")


class _Narrowed(AgentMiddleware[Any, Any, Any]):
    """Makes LangChain's request what a step wants to ask; outermost, so that the others see it so."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return handler(self._request(request))

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return await handler(self._request(request))

    def _request(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if self._settings:
            request = request.override(model_settings={**self._settings, **request.model_settings})
        return asking(request, _wanted.get(), ())


class Hooks:
    """What middleware and an answer's format add to an agent's graph.

    Args:
        model: the chat model.
        settings: what it was bound to.
        tools: all that may be on offer, the middleware's own too.
        middleware: LangChain's.
        response_format: of the answer, as `create_agent` takes it.
        system_message: goes before the conversation.
        state_schema: the user's.
        context_schema: the user's.

    Raises:
        ConfigurationError: among the middleware is a gate, or the model was bound to more than settings.
    """

    def __init__(
        self,
        model: Runnable[Any, Any],
        settings: Mapping[str, Any],
        tools: Sequence[BaseTool | Mapping[str, Any]],
        *,
        middleware: Sequence[AgentMiddleware[Any, Any, Any]],
        response_format: Any,
        system_message: SystemMessage | None,
        state_schema: type[Any] | None,
        context_schema: type[Any] | None,
    ) -> None:
        if any(isinstance(one, MetisGateMiddleware) for one in middleware):
            raise ConfigurationError(
                "middleware has a MetisGateMiddleware: this agent has a gate already. Pass that gate as `gate`, or use "
                "create_agent."
            )
        if not isinstance(model, BaseChatModel):
            raise ConfigurationError(
                f"model is a {type(model).__name__}; with middleware or a response_format it must be a chat model, "
                "as it is for create_agent."
            )
        inner = create_agent(
            model,
            [tool if isinstance(tool, BaseTool) else dict(tool) for tool in tools],
            system_prompt=system_message,
            middleware=[_Narrowed(settings), *middleware],
            response_format=response_format,
            state_schema=state_schema,
            context_schema=context_schema,
        )
        self._ask = inner.nodes["model"].bound
        self.state_schema: type[Any] = inner.builder.state_schema
        """The user's with what the hooks keep in state."""
        self.structured = response_format is not None
        self.wraps = tuple([one for one in middleware if _overrides(one, "wrap_tool_call")])
        self.nodes: dict[str, dict[str, Runnable[Any, Any]]] = {}
        """By kind: each hook that is a node, in the order in which they run."""
        for kind in _KINDS:
            named = {f"{one.name}.{kind}": one for one in middleware if _overrides(one, kind)}
            order = list(named) if kind.startswith("before") else list(reversed(named))
            self.nodes[kind] = {name: inner.nodes[name].bound for name in order}

    def ask(self, turn: Turn, wanted: Ask) -> Reply:
        """Ask the model as a step wants it."""
        token = _wanted.set(wanted)
        try:
            return self._reply(self._ask.invoke(_asked(turn)))
        finally:
            _wanted.reset(token)

    async def aask(self, turn: Turn, wanted: Ask) -> Reply:
        """The same without blocking the event loop."""
        token = _wanted.set(wanted)
        try:
            return self._reply(await self._ask.ainvoke(_asked(turn)))
        finally:
            _wanted.reset(token)

    def tool_call(self, request: Any, execute: Callable[[Any], Any]) -> Any:
        """Run a call within every `wrap_tool_call` hook."""
        return reduce(lambda inner, one: lambda it: one.wrap_tool_call(it, inner), reversed(self.wraps), execute)(
            request
        )

    async def atool_call(self, request: Any, execute: Callable[[Any], Any]) -> Any:
        """The same without blocking the event loop."""
        return await reduce(
            lambda inner, one: lambda it: one.awrap_tool_call(it, inner), reversed(self.wraps), execute
        )(request)

    def _reply(self, output: Sequence[Command[Any]]) -> Reply:
        """What the model said, and what else goes to state."""
        update: dict[str, Any] = {}
        for command in output:
            update |= command.update if isinstance(command.update, Mapping) else {}
        messages = update.pop("messages", [])
        asked = next((at for at in range(len(messages) - 1, -1, -1) if isinstance(messages[at], AIMessage)), None)
        if asked is None:
            return Reply(message=None, also=update)
        beside = tuple([message for message in messages[asked + 1 :] if isinstance(message, ToolMessage)])
        return Reply(
            message=messages[asked],
            answered=frozenset([message.tool_call_id for message in beside]),
            structured=update.get("structured_response"),
            beside=beside,
            also=update,
        )


def _asked(turn: Turn) -> dict[str, Any]:
    return {**turn.state, "messages": list(sendable(turn.messages))}


def _overrides(middleware: AgentMiddleware[Any, Any, Any], hook: str) -> bool:
    kind = type(middleware)
    return any(getattr(kind, name) is not getattr(AgentMiddleware, name) for name in (hook, f"a{hook}"))
