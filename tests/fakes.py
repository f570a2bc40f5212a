"""A chat model that follows a script, at once; for tests of everything that asks a model.

A script is a list of replies: each a string, an `AIMessage`, or a function of the messages that returns one.
The last reply is given for ever after.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import Field, PrivateAttr

Reply = str | AIMessage | Callable[[list[BaseMessage]], "str | AIMessage"]


@dataclass(frozen=True)
class Asked:
    """What the model was asked."""

    messages: tuple[BaseMessage, ...]
    tools: tuple[str, ...]
    tool_choice: str | None


class ScriptedChatModel(BaseChatModel):
    """Gives the replies of its script in order, and keeps what it was asked."""

    offers_tools_when_direct: ClassVar[bool] = False
    """It takes a conversation with calls without tools beside it."""
    script: list[Any] = Field(default_factory=lambda: ["done"])
    asked: list[Asked] = Field(default_factory=list)
    bindings: list[tuple[tuple[str, ...], str | None]] = Field(default_factory=list)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any
    ) -> Runnable[Any, AIMessage]:
        names = tuple(_name_of(tool) for tool in tools)
        self.bindings.append((names, tool_choice))
        return self.bind(tools=names, tool_choice=tool_choice, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with self._lock:
            reply: Reply = self.script[min(len(self.asked), len(self.script) - 1)]
            self.asked.append(Asked(tuple(messages), kwargs.get("tools") or (), kwargs.get("tool_choice")))
        if callable(reply):
            reply = reply(messages)
        if isinstance(reply, BaseException):
            raise reply
        message = AIMessage(reply) if isinstance(reply, str) else reply.model_copy()
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._generate(messages, stop, None, **kwargs)


def _name_of(tool: Any) -> str:
    if isinstance(tool, dict):
        # One that runs at the provider has its name there, or only a type.
        return str(tool["function"]["name"] if "function" in tool else tool.get("name") or next(iter(tool.values())))
    return tool.name if isinstance(tool, BaseTool) else str(tool.__name__)


def model(*script: Any) -> ScriptedChatModel:
    """A scripted model; without a script it always says "done"."""
    return ScriptedChatModel(script=list(script) or ["done"])


def call(tool: str, /, id: str = "call_1", **arguments: Any) -> dict[str, Any]:
    """One tool call."""
    return {"name": tool, "args": arguments, "id": id, "type": "tool_call"}


def calling(*calls: dict[str, Any], text: str = "") -> AIMessage:
    """A reply that calls tools."""
    return AIMessage(text, tool_calls=list(calls))
