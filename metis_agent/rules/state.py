"""What a turn keeps in an agent's state, in either host: its records, and notes beside them.

Records are plain dicts wherever they are stored, dataclasses wherever they are read. Checkpointers warn about (and, in
strict mode, refuse) classes that they do not know; so nodes write dicts, checkpoints hold dicts, and the channel
`Records` makes the dataclass again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Annotated, Any, Generic, NotRequired, Self, TypeVar

from langchain_core.messages import AnyMessage
from langgraph.channels import UntrackedValue
from langgraph.channels.base import BaseChannel
from langgraph.errors import InvalidUpdateError
from langgraph.types import Overwrite
from typing_extensions import TypedDict

from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["Notes", "PendingCall", "Records", "RunMarker", "as_dict", "new_notes"]

RecordT = TypeVar("RecordT", bound=GateDecision | ToolOutcome | ModelCall)


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


def new_notes(question: AnyMessage | None, task_id: str | None) -> Notes:
    """Notes on a turn that has just begun, in this task of a run."""
    return Notes(
        id=task_id or uuid.uuid4().hex, open=False, question=question, seconds=0.0, pending=[], step=0, maker="",
        draft=None, fruitless=0, refused=0, loop="",
    )  # fmt: skip


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All sequences in our records are tuples; stores and JSON give them back as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
