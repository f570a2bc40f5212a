"""What a stage of curation is: a pure filter that says of each row keep, drop or undecided, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

__all__ = ["KEEP", "Row", "Stage", "Verdict", "drop", "keep", "undecided"]

T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Row(Generic[T_co]):
    """Something to be kept or not, and its place in the source, counted from 0."""

    number: int
    value: T_co


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a stage says of a row."""

    outcome: Literal["keep", "drop", "undecided"]
    """Undecided where something around the row failed, such as a judge: the row is set aside, to be tried again."""
    reason: str = ""
    """From a short list, to be counted; of a row that is kept, a note."""
    detail: str = ""
    """What was found in this very row."""


KEEP = Verdict(outcome="keep")


def keep(note: str) -> Verdict:
    """Keep the row, and count the note."""
    return Verdict(outcome="keep", reason=note)


def drop(reason: str, detail: object = "") -> Verdict:
    """Put the row into quarantine."""
    return Verdict(outcome="drop", reason=reason, detail=str(detail)[:1_000])


def undecided(reason: str, detail: object = "") -> Verdict:
    """Set the row aside."""
    return Verdict(outcome="undecided", reason=reason, detail=str(detail)[:1_000])


class Stage(Protocol[T_contra]):
    """A filter. Asked twice about the same rows it says the same: a killed run asks again."""

    @property
    def name(self) -> str:
        """Stands in reports and in the quarantine."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its verdicts depend on besides the rows, as JSON: a run is resumed only with the same."""
        ...

    def rule(self, rows: Sequence[Row[T_contra]]) -> Sequence[Verdict]:
        """One verdict a row, in the same order; rows come in the order of the source."""
        ...
