"""What is kept of a turn beside its records, and where a turn begins: with a run, and with the question it brings."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from langchain_core.messages import AnyMessage, BaseMessage, ToolMessage
from langgraph.channels import UntrackedValue
from typing_extensions import TypedDict

from metis_agent.errors import InputError

__all__ = ["Notes", "PendingCall", "RunMarker", "begins_anew", "check_question", "new_notes"]


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
    latest: list[str]
    """Ids of the calls that were executed last, side by side."""
    digests: list[str]
    """Of all executed calls with their results."""
    polls: bool
    """Some of the calls on their way may be worth making again and again."""
    stale: int
    """Latest rounds of calls in a row that brought nothing new: the same calls, with the same results."""
    fruitless: int
    """Latest replies in a row whose calls were all answered without running."""
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
        draft=None, latest=[], digests=[], polls=False, stale=0, fruitless=0, refused=0, loop="",
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


def check_question(question: BaseMessage | None, messages: Sequence[BaseMessage]) -> None:
    """Refuse a turn without a question, before anything is paid for.

    Raises:
        InputError: there is no human message, or the last one holds neither text nor an image, file or sound.
    """
    if question is None:
        raise InputError(
            f"The input has no question: none of its {len(messages)} messages is a human message. "
            'Pass {"messages": [HumanMessage("...")]}.'
        )
    content = question.content
    if isinstance(content, str):
        blank = not content.strip()
    else:
        blank = not question.text.strip() and all(
            isinstance(block, str) or block.get("type") == "text" for block in content
        )
    if blank:
        raise InputError(
            f"The question is blank: {content!r}. The last human message must hold text or another content "
            "block; ask something."
        )
