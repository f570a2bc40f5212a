"""Reading and mending what a model call of `create_agent` gives: one reply, and messages beside it.

With LangChain's `ToolStrategy` the structured answer is itself a call, which LangChain has answered by the time
that middleware sees it. Such a call is none of the gate's business, and is kept as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain.agents.middleware.types import ModelResponse
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from metis_agent.graphs.answers import without_calls

__all__ = ["answered_in", "calls_of", "replaced", "reply_in", "with_calls"]


def reply_in(response: ModelResponse[Any]) -> AIMessage | None:
    """The model's reply; `None` where other middleware has left none."""
    return next((message for message in reversed(response.result) if isinstance(message, AIMessage)), None)


def replaced(response: ModelResponse[Any], reply: AIMessage, beside: Sequence[BaseMessage] = ()) -> ModelResponse[Any]:
    """The response with another reply, and with messages right after it."""
    old = reply_in(response)
    result: list[BaseMessage] = []
    for message in response.result:
        result += [reply, *beside] if message is old else [message]
    return ModelResponse(result=result, structured_response=response.structured_response)


def answered_in(response: ModelResponse[Any]) -> set[str]:
    """Ids of the calls that have their message already: structured answers."""
    return {message.tool_call_id for message in response.result if isinstance(message, ToolMessage)}


def calls_of(reply: AIMessage, answered: Collection[str] = ()) -> list[Any]:
    """All calls of a reply that have no message yet, however malformed."""
    return [call for call in [*reply.tool_calls, *reply.invalid_tool_calls] if _id_of(call) not in answered]


def with_calls(reply: AIMessage, ids: Collection[str]) -> AIMessage:
    """The reply without its calls but those with these ids, wherever the provider has put them."""
    bare = without_calls(reply)
    kept = [call for call in reply.tool_calls if _id_of(call) in ids]
    if not kept:
        return bare
    content: Any = reply.content
    if isinstance(content, list):
        ours = {_id_of(call) for call in calls_of(reply)} - set(ids)
        content = [block for block in content if not (isinstance(block, dict) and _id_of(block) in ours)]
    raw = reply.additional_kwargs.get("tool_calls")
    extra = dict(bare.additional_kwargs)
    if isinstance(raw, list):
        extra["tool_calls"] = [call for call in raw if _id_of(call) in ids]
    return bare.model_copy(update={"content": content, "additional_kwargs": extra, "tool_calls": kept})


def _id_of(call: Any) -> Any:
    """A call's id; content blocks of some providers name it otherwise."""
    if not isinstance(call, Mapping):
        return None
    return call.get("call_id") or call.get("id")
