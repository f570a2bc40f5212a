"""Curation: rows through stages, in chunks: bounded memory, nothing lost, nothing twice, resumed where it was killed.

A stage is a pure filter that says of each row keep, drop or undecided, and why. A chunk is the unit of work. Its rows
are ruled on, then written as whole files whose names follow from the chunk's number, and last its report: that one file
says that the chunk is done. A run that was killed, or had no room on the disk, does the unfinished chunk again and
writes the same files over. So in = kept + quarantined holds at any time, over the chunks that are done.

    OUT/run.json                           what the run depends on
    OUT/kept/segment-00000000.jsonl        what every stage kept
    OUT/quarantine/dropped/segment-...     what a stage dropped, with stage, reason and detail
    OUT/quarantine/undecided/segment-...   what could not be decided (a judge was down): curate it again
    OUT/progress/chunk-00000000.json       the report of a chunk
    OUT/report.json                        the report of the run, written last
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Literal, Protocol, TypeVar

from metis_agent import formats
from metis_agent.errors import ConfigurationError, InfrastructureError, StorageError
from metis_agent.formats import RUN_FILE, check_settings, settings_text
from metis_agent.recording.shards import Storage

__all__ = [
    "KEEP",
    "Chunking",
    "Codec",
    "CurationReport",
    "Mark",
    "Pipeline",
    "Row",
    "Stage",
    "StageReport",
    "Verdict",
    "drop",
    "keep",
    "undecided",
]

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


T = TypeVar("T")

_DROPPED, _UNDECIDED = "quarantine/dropped", "quarantine/undecided"
_ALL_FAIL = 20


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Why a row is in quarantine."""

    stage: str
    reason: str
    detail: str


class Codec(Protocol[T_contra]):
    """Rows as lines."""

    def line(self, value: T_contra) -> str:
        """A row that is kept."""
        ...

    def marked(self, value: T_contra, mark: Mark) -> str:
        """A row in quarantine."""
        ...

    def folder(self, value: T_contra) -> str:
        """The folder for a row that is kept, such as "kept"."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How much is done at a time: what memory has to hold."""

    rows: int = 1_000
    bytes: int = 32 * 2**20
    """Of rows as they are written; a chunk ends with the row that goes over."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.bytes < 1:
            raise ConfigurationError(f"{self!r}: a chunk has at least 1 row and 1 byte.")


class Pipeline(Generic[T]):
    """Stages in a row, and the folder that the outcome goes to.

    Args:
        out: a folder or any fsspec URL; an unfinished run in it is taken up.
        stages: in order, the cheap ones first.
        codec: how rows are written.
        settings: what the run depends on besides the stages, such as the source, as JSON.
        chunking: how much is done at a time.
        fresh: start again, over what an earlier run left.
        storage_options: keywords for the fsspec file system.

    Raises:
        ConfigurationError: two stages have one name, or the folder holds a run with other settings.
        StorageError: the folder can't be read or written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        stages: Sequence[Stage[T]],
        codec: Codec[T],
        *,
        settings: Mapping[str, Any],
        chunking: Chunking = Chunking(),
        fresh: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._out, self._options = os.fspath(out).rstrip("/"), storage_options
        self._stages, self._codec, self._chunking = tuple(stages), codec, chunking
        self._names = [stage.name for stage in stages]
        if len(set(self._names)) != len(self._names):
            raise ConfigurationError(f"stages {self._names!r}: each needs a name of its own.")
        self._prepare(settings, fresh=fresh)

    def run(self, rows: Iterable[T], *, progress: Callable[[CurationReport], None] = lambda _: None) -> CurationReport:
        """Curate the rows; `progress` gets the counts so far after each chunk.

        Args:
            rows: all of the source, from its start, in an order that is the same each time.
            progress: called with the report of all chunks that are done.

        Raises:
            InfrastructureError: a stage could decide no row of a chunk; run again when what it needs is back.
            StorageError: no room, for instance; run again to go on.
        """
        report, done = self._done()
        if report.rows:
            progress(report)
        numbered = (Row(number=number, value=value) for number, value in enumerate(rows))
        skipped = sum(1 for _ in islice(numbered, report.rows))
        if skipped < report.rows:
            raise ConfigurationError(f"the source has {skipped} rows, and {report.rows} were curated; use --fresh.")
        for number, chunk in enumerate(self._chunks(numbered), start=done):
            report.add(self._curate(number, chunk))
            progress(report)
        return report

    def finish(self, report: CurationReport) -> None:
        """Write the run's report."""
        self._put(
            "", "report.json", json.dumps(formats.with_format(report.to_dict(), formats.FIGURES), indent=2) + "\n"
        )

    # --- one chunk -------------------------------------------------------------------------------------------

    def _chunks(self, rows: Iterator[Row[T]]) -> Iterator[list[tuple[Row[T], str]]]:
        chunk: list[tuple[Row[T], str]] = []
        size = 0
        for row in rows:
            line = self._codec.line(row.value)
            chunk.append((row, line))
            size += len(line)
            if len(chunk) >= self._chunking.rows or size >= self._chunking.bytes:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _curate(self, number: int, chunk: list[tuple[Row[T], str]]) -> CurationReport:
        report = CurationReport.of(self._names)
        report.rows = len(chunk)
        lines = {row.number: line for row, line in chunk}
        files: dict[str, list[str]] = defaultdict(list)
        left = [row for row, _ in chunk]
        for stage, counts in zip(self._stages, report.stages, strict=True):
            going_on = []
            for row, verdict in self._ruled(stage, left):
                counts.count(verdict)
                if verdict.outcome == "keep":
                    going_on.append(row)
                    continue
                mark = Mark(stage=stage.name, reason=verdict.reason, detail=verdict.detail)
                folder = _DROPPED if verdict.outcome == "drop" else _UNDECIDED
                files[folder].append(self._codec.marked(row.value, mark))
            left = going_on
        for row in left:
            folder = self._codec.folder(row.value)
            report.kept[folder] += 1
            files[folder].append(lines[row.number])
        for folder, content in files.items():
            self._put(folder, f"segment-{number:08d}.jsonl", "\n".join(content) + "\n")
        self._put("progress", f"chunk-{number:08d}.json", json.dumps(report.to_dict()))
        return report

    def _ruled(self, stage: Stage[T], rows: list[Row[T]]) -> list[tuple[Row[T], Verdict]]:
        verdicts = list(stage.rule(rows)) if rows else []
        if len(rows) >= _ALL_FAIL and all(verdict.outcome == "undecided" for verdict in verdicts):
            raise InfrastructureError(
                f"stage {stage.name!r} could decide none of {len(rows)} rows: {verdicts[0].reason} "
                f"({verdicts[0].detail or 'no detail'}). Nothing of them was written; mend that, then run the same "
                "command again to go on from here."
            )
        return list(zip(rows, verdicts, strict=True))

    # --- the folder ------------------------------------------------------------------------------------------

    def _place(self, folder: str) -> Storage:
        return Storage(f"{self._out}/{folder}" if folder else self._out, self._options)

    def _put(self, folder: str, name: str, content: str) -> None:
        self._place(folder).put(name, content.encode())

    def _prepare(self, settings: Mapping[str, Any], *, fresh: bool) -> None:
        stages = {stage.name: dict(stage.settings) for stage in self._stages}
        chunking = {"rows": self._chunking.rows, "bytes": self._chunking.bytes}
        wanted = json.loads(json.dumps({"settings": dict(settings), "stages": stages, "chunking": chunking}))
        place = self._place("")
        if RUN_FILE in place.names():
            if not fresh:
                check_settings(b"".join(place.blocks(RUN_FILE)), wanted, place.url, option="--out")
                return
            self._clear()
        elif {"kept", "quarantine", "progress"} & set(place.names()):
            raise ConfigurationError(f"{place.url!r} holds other files ('kept' or so) and no run; name another folder.")
        self._put("", RUN_FILE, settings_text(wanted))

    def _clear(self) -> None:
        """Remove what an earlier run wrote; its run.json said that it is one."""
        place = self._place("")
        place.remove("report.json")
        for name in set(place.names()) & {"progress", "kept", "train", "test", "quarantine"}:
            try:
                place.fs.rm(f"{place.root}/{name}", recursive=True)
            except Exception as error:  # each file system has exceptions of its own
                raise StorageError(f"{name!r} in {place.url!r} can't be removed: {error}.") from error

    def _done(self) -> tuple[CurationReport, int]:
        """The report of the chunks that are done, and their number."""
        report, place = CurationReport.of(self._names), self._place("progress")
        names = sorted(name for name in place.names() if name.startswith("chunk-") and name.endswith(".json"))
        for number, name in enumerate(names):
            if name != f"chunk-{number:08d}.json":
                raise StorageError(f"chunk {number} is missing in {place.url!r}; use --fresh to start again.")
            report.add(CurationReport.from_dict(json.loads(b"".join(place.blocks(name)))))
        return report, len(names)
