"""From what a tool returned or raised to what goes into state: messages that answer the call, and its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import ToolException
from langgraph import errors as langgraph_errors
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt.tool_node import ToolInvocationError
from langgraph.types import Command
from pydantic import ValidationError

from metis_agent.deadline import DeadlineError
from metis_agent.errors import InfrastructureError, ToolError
from metis_agent.graphs.enforcement import SentCall
from metis_agent.graphs.guard import echo_of
from metis_agent.graphs.records import as_dict
from metis_agent.types import OutcomeStatus, ToolOutcome

__all__ = ["ToolResult", "failure_of", "update_of"]

ToolResult = Any
"""A `ToolMessage`, a `Command`, or a list of both."""


def failure_of(call: SentCall, error: Exception, limit: float | None) -> tuple[OutcomeStatus, ToolMessage]:
    """What the model reads of a failed call.

    Raises:
        Exception: the same error, where it is not for the model: interrupts, commands to a parent graph, and
            infrastructure failures.
    """
    if isinstance(error, GraphBubbleUp | InfrastructureError) or _is_invalid_resume(error):
        raise error
    name, status = call["name"], "error"
    if isinstance(error, DeadlineError):
        status, text = "timeout", f"{name} gave no result within {limit:.3g} seconds and was abandoned."
    elif isinstance(error, ValidationError):
        text = str(ToolInvocationError(name, error, call["args"]))
    elif isinstance(error, ToolException | ToolError | ToolInvocationError):
        text = str(error)
    else:
        text = f"{name} failed with {type(error).__name__}: {error}"
    message = ToolMessage(text, name=name, tool_call_id=call["id"], status="error")
    return ("timeout" if status == "timeout" else "error"), message


def update_of(
    call: SentCall, result: ToolResult, status: OutcomeStatus | None, *, seconds: float, cost: float
) -> list[Command[Any]]:
    """The result with its outcome, and with an answer for each twin of the call.

    Args:
        call: the call.
        result: what the tool returned, or what `failure_of` made of its error.
        status: the outcome's; by default that of the message.
        seconds: duration.
        cost: declared price of one call.
    """
    items: list[Any] = list(result) if isinstance(result, list) else [result]
    message = _message_for(call, items)
    if message is None:
        message = ToolMessage(
            f"{call['name']} returned nothing that answers the call.",
            name=call["name"], tool_call_id=call["id"], status="error",
        )  # fmt: skip
        if not _leaves_the_graph(items):
            items.append(message)
    outcome = ToolOutcome(
        call_id=call["id"] or "",
        tool=call["name"],
        arguments=call["args"],
        status=status or ("error" if message.status == "error" else "ok"),
        content=str(message.text),
        seconds=seconds,
        cost=cost,
    )
    messages, outcomes = [item for item in items if isinstance(item, ToolMessage)], [as_dict(outcome)]
    for twin in call.get("twins", ()):
        echo = echo_of(message, twin)
        messages.append(echo)
        outcomes.append(
            as_dict(
                ToolOutcome(
                    call_id=twin, tool=call["name"], arguments=call["args"], status="repeated",
                    content=str(echo.text),
                )
            )
        )  # fmt: skip
    own: Command[Any] = Command(update={"messages": messages, "outcomes": outcomes})
    return [own, *(item for item in items if isinstance(item, Command))]


def _message_for(call: SentCall, items: Sequence[Any]) -> ToolMessage | None:
    for item in items:
        found: Any = item
        if isinstance(item, Command):
            found = item.update.get("messages") if isinstance(item.update, dict) else None
        for message in found if isinstance(found, list) else [found]:
            if isinstance(message, ToolMessage) and message.tool_call_id == call["id"]:
                return message
    return None


def _leaves_the_graph(items: Sequence[Any]) -> bool:
    """A hand-over to a parent graph brings its own messages, if any."""
    return any(isinstance(item, Command) and item.graph == Command.PARENT for item in items)


def _is_invalid_resume(error: Exception) -> bool:
    """True for an answer to an interrupt that has the wrong form: the user's to mend, not the model's."""
    check = getattr(langgraph_errors, "is_invalid_resume", None)  # newer LangGraph versions only
    return check is not None and bool(check(error))
