"""What is kept of a turn beside its records, and where a turn begins: with a run, and with the question it brings."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from langchain_core.messages import AnyMessage, ToolMessage
from langgraph.channels import UntrackedValue
from typing_extensions import TypedDict

__all__ = ["Notes", "PendingCall", "RunMarker", "begins_anew", "new_notes"]


class PendingCall(TypedDict):
    """A call on its way to its tool, or to the message that stands in for its result."""

    id: str
    name: str
    args: dict[str, Any]
    settled: NotRequired[Any]
    """For a call that must not run: the content of its message."""
    status: NotRequired[str]
    """Of the same: of that message."""


class Notes(TypedDict):
    """What is kept of the turn beside its records, in plain values."""

    id: str
    open: bool
    """Whether it has still to be answered."""
    question: AnyMessage | None
    """The message that opened the turn: other middleware may summarise it away."""
    seconds: float
    """Time that model and tools have been at work: of parallel tools, the slowest. Waiting at an interrupt is not
    counted."""
    pending: list[PendingCall]
    step: int
    """Counts the rounds of calls whose outcomes have been taken in."""
    maker: str
    """The process that sent them."""
    draft: dict[str, Any] | None
    """The turn's direct draft, where the gate has asked for one."""
    fruitless: int
    """Replies of this turn whose calls were all answered without running."""
    refused: int
    """Latest replies in a row whose calls were all refused by a person or by other middleware."""
    loop: str
    """Why the turn has to end now, where its calls lead nowhere."""


RunMarker = Annotated[bool, UntrackedValue]
"""A state key that is never stored: it is set from a run's first step on, so that the next run finds it unset."""


def new_notes(messages: Sequence[AnyMessage], task_id: str | None) -> Notes:
    """Notes on a turn that has just begun, in this task of a run."""
    question = next((message for message in reversed(messages) if message.type == "human"), None)
    return Notes(
        id=task_id or uuid.uuid4().hex, open=False, question=question, seconds=0.0, pending=[], step=0, maker="",
        draft=None, fruitless=0, refused=0, loop="",
    )  # fmt: skip


def begins_anew(notes: Notes, messages: Sequence[AnyMessage]) -> bool:
    """Whether a run that has just begun is a turn of its own, by the notes that an earlier run has left.

    Where that one stopped before the turn was answered, this one goes on from there, unless it brings a new question.
    """
    if not notes["open"] or not messages:
        return True
    last, question = messages[-1], notes["question"]
    if last.type != "human" or (question is not None and last.id == question.id):
        return False
    answered = {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}
    return not notes["pending"] or any(call["id"] not in answered for call in notes["pending"])
