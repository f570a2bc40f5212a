"""What an agent's state holds of a turn: its records, and notes beside them; and where a turn begins."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Annotated, Any, Generic, NotRequired, Self, TypeVar

from langchain_core.messages import AnyMessage, BaseMessage, ToolMessage
from langgraph.channels import LastValue, UntrackedValue
from langgraph.channels.base import BaseChannel
from langgraph.errors import InvalidUpdateError
from langgraph.types import Overwrite
from typing_extensions import TypedDict

from metis_agent.errors import InputError
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = [
    "Latest",
    "Notes",
    "PendingCall",
    "Records",
    "RunMarker",
    "as_dict",
    "begins_anew",
    "check_question",
    "new_notes",
    "with_question",
]


RecordT = TypeVar("RecordT", bound=GateDecision | ToolOutcome | ModelCall)


class PendingCall(TypedDict):
    """A call on its way to its tool, or to the message that stands in for its result."""

    id: str
    name: str
    args: dict[str, Any]
    settled: NotRequired[Any]
    """For a call that must not run: the content of its message."""
    status: NotRequired[str]
    """Of the same: of that message."""
    added: NotRequired[str]
    """For a call of no tool that was seen on offer: what the model reads where no other code has added one."""


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
    answered: NotRequired[bool]
    """The structured answer is there, and calls beside it are on their way: what they bring is for nobody to read."""
    loop: str
    """Why the turn has to end now, where its calls lead nowhere."""


def as_dict(record: GateDecision | ToolOutcome | ModelCall) -> dict[str, Any]:
    """The record's fields, as nodes write them to state."""
    return dict(vars(record))


class Records(BaseChannel[list[RecordT], list[RecordT | dict[str, Any]], list[dict[str, Any]]], Generic[RecordT]):
    """A list of records of one class, empty at first.

    Args:
        record: the dataclass.
        key: the channel's name; LangGraph fills it in.
        append: a write adds to the list (an `Overwrite` still replaces it); otherwise each write replaces it.
    """

    __slots__ = ("append", "records")

    def __init__(self, record: type[RecordT], key: str = "", *, append: bool = True) -> None:
        super().__init__(record, key)
        self.append = append
        self.records: list[RecordT] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Records) and (other.typ, other.append) == (self.typ, self.append)

    __hash__ = None  # type: ignore[assignment]

    @property
    def ValueType(self) -> Any:
        """What reading gives."""
        return GenericAlias(list, (self.typ,))

    @property
    def UpdateType(self) -> Any:
        """What writing takes."""
        return GenericAlias(list, (self.typ,))

    def copy(self) -> Self:
        """The same channel with the same records."""
        twin = type(self)(self.typ, self.key, append=self.append)
        twin.records = self.records
        return twin

    def from_checkpoint(self, checkpoint: Any) -> Self:
        """This channel as it was stored; anything but a list stands for a channel never stored."""
        twin = type(self)(self.typ, self.key, append=self.append)
        if isinstance(checkpoint, list):
            twin.records = self._revive(checkpoint)
        return twin

    def checkpoint(self) -> list[dict[str, Any]]:
        """Plain values only."""
        return [as_dict(record) for record in self.records]

    def get(self) -> list[RecordT]:
        """The records."""
        return self.records

    def is_available(self) -> bool:
        """Always: a list may be empty."""
        return True

    def update(self, values: Sequence[Any]) -> bool:
        """Take in the writes of one step.

        Raises:
            InvalidUpdateError: a write is no list of records.
        """
        for value in values:
            replaces = not self.append
            if isinstance(value, Overwrite):
                replaces, value = True, value.value
            records = self._revive(value)
            # A new list: earlier readers keep the one that they got.
            self.records = records if replaces else [*self.records, *records]
        return bool(values)

    def _revive(self, values: Any) -> list[RecordT]:
        if not isinstance(values, list | tuple):
            raise InvalidUpdateError(
                f"At key {self.key!r}: got {values!r}; write a list of {self.typ.__name__} or of their fields."
            )
        return [value if isinstance(value, self.typ) else self.typ(**_with_tuples(value)) for value in values]


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All sequences in our records are tuples; stores and JSON give them back as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


class Latest(LastValue[RecordT]):
    """The last of the values that one step writes: a run may be sent to two of its nodes at once, by `Command`."""

    __slots__ = ()

    def update(self, values: Sequence[Any]) -> bool:
        """Take in the writes of one step."""
        return super().update(values[-1:])


RunMarker = Annotated[bool, UntrackedValue(bool, guard=False)]
"""A state key that is never stored: it is set from a run's first step on, so that the next run finds it unset."""


def new_notes(messages: Sequence[AnyMessage], task_id: str | None) -> Notes:
    """Notes on a turn that has just begun, in this task of a run."""
    question = next((message for message in reversed(messages) if message.type == "human"), None)
    return Notes(
        id=task_id or uuid.uuid4().hex, open=False, question=question, seconds=0.0, pending=[], step=0,
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


def with_question(messages: Sequence[AnyMessage], question: AnyMessage | None) -> Sequence[AnyMessage]:
    """The conversation with the turn's question as its last human message, whatever has been added or summarised since.

    Other human messages after the question are left out, or all where it had gone.
    """
    if question is None:
        return messages
    place = last = None
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].type == "human":
            last = index if last is None else last
            if messages[index].id == question.id:
                # As other code has left it.
                place, question = index, messages[index]
                break
    if place is not None and place == last:
        return messages
    before, after = (messages[:place], messages[place + 1 :]) if place is not None else ([], messages)
    return [*before, question, *(message for message in after if message.type != "human")]


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
