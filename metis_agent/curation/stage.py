"""What a stage of curation is: a pure filter that says of each row keep, drop or undecided, and why.

What curation did: for each stage how many rows came in, how many went on, and why the others did not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

__all__ = ["KEEP", "CurationReport", "Row", "Stage", "StageReport", "Verdict", "drop", "keep", "undecided"]

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


@dataclass(kw_only=True)
class StageReport:
    """The counts of one stage."""

    name: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By reason."""
    undecided: Counter[str] = field(default_factory=Counter)
    """By reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """Remarks on rows that went on."""

    def count(self, verdict: Verdict) -> None:
        """Take in one verdict."""
        self.rows_in += 1
        if verdict.outcome == "keep":
            self.rows_out += 1
            if verdict.reason:
                self.notes[verdict.reason] += 1
        else:
            (self.dropped if verdict.outcome == "drop" else self.undecided)[verdict.reason] += 1

    def add(self, other: StageReport) -> None:
        """Take in the counts of another part of the run."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        self.dropped += other.dropped
        self.undecided += other.undecided
        self.notes += other.notes

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "name": self.name,
            "in": self.rows_in,
            "out": self.rows_out,
            "dropped": dict(self.dropped.most_common()),
            "undecided": dict(self.undecided.most_common()),
            "notes": dict(self.notes.most_common()),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StageReport:
        """The reverse of `to_dict`."""
        counts = {name: Counter(record[name]) for name in ("dropped", "undecided", "notes")}
        return cls(name=record["name"], rows_in=record["in"], rows_out=record["out"], **counts)


@dataclass(kw_only=True)
class CurationReport:
    """The counts of a run, or of one chunk of it. Always `rows == kept + dropped + undecided`."""

    stages: list[StageReport]
    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    """By the folder that they went to."""
    unreadable: int = 0
    """Lines of the source that hold no record; they are still there."""

    @classmethod
    def of(cls, names: Sequence[str]) -> CurationReport:
        """All zero."""
        return cls(stages=[StageReport(name=name) for name in names])

    @property
    def dropped(self) -> int:
        """Rows in quarantine for good."""
        return sum(stage.dropped.total() for stage in self.stages)

    @property
    def undecided(self) -> int:
        """Rows in quarantine until they can be decided."""
        return sum(stage.undecided.total() for stage in self.stages)

    def add(self, other: CurationReport) -> None:
        """Take in a further chunk."""
        self.rows += other.rows
        self.kept += other.kept
        for mine, theirs in zip(self.stages, other.stages, strict=True):
            mine.add(theirs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "rows": self.rows,
            "kept": self.kept.total(),
            "dropped": self.dropped,
            "undecided": self.undecided,
            "unreadable_lines": self.unreadable,
            "kept_in": dict(self.kept),
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CurationReport:
        """The reverse of `to_dict`."""
        return cls(
            stages=[StageReport.from_dict(stage) for stage in record["stages"]],
            rows=record["rows"],
            kept=Counter(record["kept_in"]),
            unreadable=record["unreadable_lines"],
        )
