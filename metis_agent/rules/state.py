"""A state channel for our records: plain dicts wherever they are stored, dataclasses wherever they are read.

Checkpointers warn about (and, in strict mode, refuse) classes that they do not know. So nodes write dicts,
checkpoints hold dicts, and this channel makes the dataclass again: the one place where that is solved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import GenericAlias
from typing import Any, Generic, Self, TypeVar

from langgraph.channels.base import BaseChannel
from langgraph.errors import InvalidUpdateError
from langgraph.types import Overwrite

from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["Records", "as_dict"]

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


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All sequences in our records are tuples; stores and JSON give them back as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
