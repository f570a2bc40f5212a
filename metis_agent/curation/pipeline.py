"""Rows through stages, in chunks: bounded memory, nothing lost, nothing twice, resumed where it was killed.

A chunk is the unit of work. Its rows are ruled on, then written as whole files whose names follow from the chunk's
number, and last its report: that one file says that the chunk is done. A run that was killed, or had no room on the
disk, does the unfinished chunk again and writes the same files over. So in = kept + quarantined holds at any time,
over the chunks that are done.

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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from metis_agent import formats
from metis_agent.curation.stage import CurationReport, Row, Stage, Verdict
from metis_agent.errors import ConfigurationError, InfrastructureError, StorageError
from metis_agent.formats import RUN_FILE, check_settings, settings_text
from metis_agent.recording.storage import Storage

__all__ = ["Chunking", "Codec", "Mark", "Pipeline"]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

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
