r"""The import itself: an export is read, sorted by trace, made into trajectories, and put into the store.

    read each record -> spool (by trace) -> traces -> trajectories -> without secrets -> store
                    \-> rejects           \-> rejects

A state file says how far it is, after every few seconds of work. A stopped import goes on from there when the same
command is given again; whatever was written after that point is cut off or recognised by its id, so that the result is
the same however often it was stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.formats import atomic_write
from metis_agent.recording.store import TrajectoryStore, spread
from metis_agent.tools.redaction import Redactor, redacting
from metis_agent.traces import reading
from metis_agent.traces.assemble import trajectories_of
from metis_agent.traces.reading import BadRecord, Record, Spool, shelves_for
from metis_agent.traces.registry import Importer, importer, importer_names, recognised
from metis_agent.traces.values import elements_of
from metis_agent.types import Trajectory

__all__ = ["ImportProgress", "ImportReport", "import_traces"]

_EVERY_SECONDS = 5.0
_SAMPLED_FILES, _SAMPLED_RECORDS = 20, 5
_LONGEST_REJECT = 2**20
_REMEMBERED = 2**25
"""Characters of texts that are known to hold no secret, or to hold which."""
_FORMAT = 1
_UNREADABLE = (InputError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What strange records raise in an importer; anything else is a fault that has to be seen."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What became of an export; nothing of it is left uncounted."""

    format: str
    records: int = 0
    """Records read: lines, elements, rows."""
    parts: int = 0
    """Spans, messages and scores in them."""
    traces: int = 0
    trajectories: int = 0
    """Turns that are in the store by this import."""
    failed: int = 0
    """Those of them that failed or broke off."""
    duplicates: int = 0
    """Turns that were there already."""
    tool_calls: int = 0
    rejected: int = 0
    """Records and traces that could not be read; each is in `rejects` with its reason."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why, and how many."""
    handled: Mapping[str, int] = field(default_factory=dict)
    """What was unusual and could be handled, such as spans that came twice."""
    seconds: float = 0.0
    rejects: str = ""
    """The file of what could not be read."""
    log: str = ""


@dataclass(frozen=True, kw_only=True)
class ImportProgress:
    """How far an import is."""

    stage: str
    """`reading`, then `storing`."""
    done: int
    """Bytes, while reading; files of the spool, while storing."""
    total: int
    records: int
    trajectories: int
    rejected: int


def import_traces(
    sources: Sequence[str | os.PathLike[str]],
    store: TrajectoryStore,
    *,
    format: str | None = None,
    folder: Path | None = None,
    redactor: Redactor | None = None,
    progress: Callable[[ImportProgress], None] | None = None,
    ray: str | None = None,
) -> ImportReport:
    """Read traces into a store: in a stream, resumable, each trace once, without secrets.

    Args:
        sources: files, folders, patterns and URLs of an export, or the address of a database.
        store: where the trajectories go.
        format: an importer's name; by default what the first records look like.
        folder: where state, spool, rejects and log are kept; by default `imports` in the store's folder.
        redactor: takes out secrets; by default what looks like one, and those that the environment holds.
        progress: called every few seconds.
        ray: address of a Ray cluster on which trajectories are made of traces (see `recording.store`); all its
            machines must see `folder`.

    Raises:
        ConfigurationError: the format is unknown, or the same import is running.
        InputError: no importer recognises the records.
        StorageError: a source can't be read, or the store can't be written to.
        MissingDependencyError: a source needs a package that is not installed.
    """
    places, reader = _opened([os.fspath(source) for source in sources], format)
    redactor = redactor or Redactor.from_environment()
    job = _Job(places, reader, store, folder or _folder_of(store), redactor, progress, ray)
    with job.held():
        return job.run()


def _opened(sources: list[str], format: str | None) -> tuple[list[str], Importer]:
    if not sources:
        raise ConfigurationError("no source is given; name a file, a folder or a database with traces.")
    named = importer(format) if format else None
    openers = [named] if named else [importer(name) for name in importer_names()]
    for reader in openers:
        if all(reader.opens(source, _start_of(source)) for source in sources):
            return sources, reader
    places = reading.expanded(sources)
    return places, named or _recognised(places)


def _start_of(source: str) -> bytes:
    if "://" in source or not Path(source).is_file():
        return b""
    with open(source, "rb") as file:
        return file.read(100)


def _recognised(places: list[str]) -> Importer:
    seen: list[Mapping[str, Any]] = []
    for place in places[:_SAMPLED_FILES]:
        for count, record in enumerate(reading.records_of(place)):
            if count >= 20 * _SAMPLED_RECORDS or len(seen) >= _SAMPLED_FILES * _SAMPLED_RECORDS:
                break
            if isinstance(record, Record):
                seen += islice(elements_of(record.value), _SAMPLED_RECORDS)
                if count >= _SAMPLED_RECORDS:
                    break
    return recognised(seen, places[0])


def _folder_of(store: TrajectoryStore) -> Path:
    return Path(".metis-imports") if "://" in store.url else Path(store.url) / "imports"


class _Job:
    """One import: its counts, and its place in the export."""

    def __init__(
        self,
        places: list[str],
        reader: Importer,
        store: TrajectoryStore,
        folder: Path,
        redactor: Redactor,
        progress: Callable[[ImportProgress], None] | None,
        ray: str | None,
    ) -> None:
        self._sizes = [reading.size_of(place) if reader.stable else 0 for place in places]
        signature = [reader.name, *((os.path.abspath(p), s) for p, s in zip(places, self._sizes, strict=True))]
        self._name = hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:12]
        self._folder = folder / self._name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._places, self._reader, self._store = places, reader, store
        self._redactor, self._progress, self._ray = redactor, progress, ray
        self._state = self._state_file()
        self._counts: Counter[str] = Counter(self._state["counts"])
        self._reasons: Counter[str] = Counter(self._state["reasons"])
        self._handled: Counter[str] = Counter(self._state["handled"])
        self._log = logging.Logger(f"metis.import.{self._name}")
        self._rejects = open(self._folder / "rejects.jsonl", "ab")  # noqa: SIM115 - closed by `held`
        self._rejects.truncate(self._state["rejects"])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone at this import; its files are closed in the end."""
        handler = logging.FileHandler(self._folder / "import.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._log.addHandler(handler)
        lock = open(self._folder / "lock", "ab")  # noqa: SIM115
        try:
            _lock(lock.fileno(), self._folder)
            yield
        finally:
            lock.close()
            self._rejects.close()
            handler.close()

    def run(self) -> ImportReport:
        """Go on from where the state is, to the end."""
        began = time.monotonic() - self._state["seconds"]
        self._log.info(
            "import of %d places as %s, stage %s", len(self._places), self._reader.name, self._state["stage"]
        )
        spool = Spool(self._folder / "spool", shelves_for(sum(self._sizes)), self._state["spool"])
        try:
            if self._state["stage"] == "reading":
                self._read(spool, began)
                self._save("storing", began, spool=spool.flush(), shelf=0)
            self._put(spool, began)
        except BaseException as error:
            spool.close()
            self._log.info("stopped: %s: %s", type(error).__name__, error)
            raise
        self._save("done", began, spool=None)
        spool.remove()
        report = self._report(time.monotonic() - began)
        self._log.info("done: %s", json.dumps(asdict(report)))
        return report

    # --- reading ---------------------------------------------------------------------------------------------------

    def _read(self, spool: Spool, began: float) -> None:
        saved = time.monotonic()
        bytes_read = sum(self._sizes[: self._state["place"]])
        for number in range(self._state["place"], len(self._places)):
            place = self._places[number]
            skip = self._state["record"] if number == self._state["place"] else 0
            here = 0
            for record in self._reader.records(place, skip):
                self._counts["records"] += 1
                if isinstance(record, BadRecord):
                    self._reject(record.reason, place, record.number, record.raw)
                else:
                    self._spool(spool, place, record)
                    here += len(record.raw or b"")
                if time.monotonic() - saved > _EVERY_SECONDS:
                    self._save("reading", began, spool=spool.flush(), place=number, record=record.number)
                    saved = time.monotonic()
                    self._tell("reading", min(bytes_read + here, sum(self._sizes)), sum(self._sizes))
            bytes_read += self._sizes[number]
            self._state["place"], self._state["record"] = number + 1, 0

    def _spool(self, spool: Spool, place: str, record: Record) -> None:
        try:
            for inner in elements_of(record.value):
                for key, part in self._reader.parts(inner):
                    self._counts["parts"] += 1
                    spool.add(key, record.raw if part is record.value and record.raw is not None else part)
        except _UNREADABLE as error:
            self._reject(_reason(error), place, record.number, record.raw or _json(record.value))

    # --- storing ---------------------------------------------------------------------------------------------------

    def _put(self, spool: Spool, began: float) -> None:
        ours, others = self._stored()
        total = len(self._state["spool"])
        told = time.monotonic()
        made = partial(_made, reader=self._reader, name=self._name, folder=spool.folder, redactor=self._redactor)
        shelves = range(self._state["shelf"], total)
        for shelf, groups in zip(shelves, spread(made, shelves, ray=self._ray), strict=True):
            for group in groups:
                self._counts["traces"] += group.traces
                self._handled.update(group.odd)
                for trajectory in group.trajectories:
                    self._put_one(trajectory, ours, others)
                if group.reject is not None:
                    self._reject(group.reject, None, group.key, group.raw)
                if time.monotonic() - told > _EVERY_SECONDS:
                    told = time.monotonic()
                    self._tell("storing", shelf, total)
            self._store.flush()
            self._save("storing", began, shelf=shelf + 1)
        self._tell("storing", total, total)

    def _stored(self) -> tuple[set[str], set[str]]:
        """Ids in the store: those of this import before it was stopped, and those of others."""
        ours: set[str] = set()
        others: set[str] = set()
        for trajectory in self._store.read(whole=False):
            mine = trajectory.metadata.get("import") == self._name and not self._state["again"]
            (ours if mine else others).add(trajectory.id)
        return ours, others

    def _put_one(self, trajectory: Trajectory, ours: set[str], others: set[str]) -> None:
        if trajectory.id in others:
            self._counts["duplicates"] += 1
            return
        if trajectory.id not in ours:
            self._store.append(trajectory)
        others.add(trajectory.id)
        self._counts["trajectories"] += 1
        self._counts["failed"] += trajectory.status == "failed"
        self._counts["tool_calls"] += trajectory.tool_calls

    # --- what is kept of it -----------------------------------------------------------------------------------------

    def _reject(self, reason: str, place: str | None, where: int | str, raw: bytes) -> None:
        self._counts["rejected"] += 1
        self._reasons[reason] += 1
        text = self._redactor.text(raw[:_LONGEST_REJECT].decode("utf-8", "replace"))
        line = {"reason": reason, **({"file": place, "record": where} if place else {"trace": where}), "content": text}
        if len(raw) > _LONGEST_REJECT:
            line["cut"] = f"the first {_LONGEST_REJECT:,} of {len(raw):,} bytes"
        self._rejects.write(json.dumps(line).encode() + b"\n")

    def _state_file(self) -> dict[str, Any]:
        new = {
            "format": _FORMAT, "stage": "reading", "place": 0, "record": 0, "shelf": 0, "spool": None, "rejects": 0,
            "seconds": 0.0, "counts": {}, "reasons": {}, "handled": {}, "again": False,
        }  # fmt: skip
        try:
            state = json.loads((self._folder / "state.json").read_bytes())
        except (OSError, ValueError):
            return new
        if state.get("format") != _FORMAT or state.get("stage") == "done":
            return {**new, "again": state.get("stage") == "done"}
        if state["stage"] == "reading" and not self._reader.stable:
            return new
        return {**new, **state}

    def _save(self, stage: str, began: float, **changed: Any) -> None:
        self._rejects.flush()
        self._state |= {
            "stage": stage, "rejects": self._rejects.tell(), "seconds": time.monotonic() - began,
            "counts": dict(self._counts), "reasons": dict(self._reasons), "handled": dict(self._handled), **changed,
        }  # fmt: skip
        atomic_write(self._folder / "state.json", json.dumps(self._state).encode())
        self._log.info("%s: %s", stage, ", ".join(f"{count:,} {name}" for name, count in self._counts.items()))

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            counts = {name: self._counts[name] for name in ("records", "trajectories", "rejected")}
            self._progress(ImportProgress(stage=stage, done=done, total=total, **counts))

    def _report(self, seconds: float) -> ImportReport:
        return ImportReport(
            format=self._reader.name,
            **self._counts,
            reasons=dict(self._reasons.most_common()),
            handled=dict(self._handled.most_common()),
            seconds=seconds,
            rejects=str(self._folder / "rejects.jsonl") if self._counts["rejected"] else "",
            log=str(self._folder / "import.log"),
        )


@dataclass(kw_only=True)
class _Group:
    """What the parts of one key became."""

    key: str
    traces: int = 0
    trajectories: list[Trajectory] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)
    reject: str | None = None
    """Why they, or the rest of them, could not be read."""
    raw: bytes = b""


def _made(shelf: int, *, reader: Importer, name: str, folder: Path, redactor: Redactor) -> Iterator[_Group]:
    """The trajectories of one file of the spool, without secrets."""
    clean = _remembering(redactor)
    for key, parts in Spool.groups(folder, shelf):
        group = _Group(key=key)
        try:
            if parts is None:
                raise InputError("the trace is larger than 256 MiB")
            for trace in reader.traces(key, parts):
                group.traces += 1
                cleaned = redacting(clean)  # a turn's messages are the history of those that follow
                try:
                    for made in trajectories_of(trace):
                        named = replace(made, metadata={**made.metadata, "import": name})
                        group.trajectories.append(cleaned(named))
                finally:
                    group.odd.update(trace.odd)
        except _UNREADABLE as error:
            group.reject, group.raw = _reason(error), _json(parts)
        yield group


def _remembering(redactor: Redactor) -> Redactor:
    """The same redactor; a text that comes again, as history does turn after turn, is looked through once."""
    known: dict[str, str] = {}
    size = 0

    def text(given: str) -> str:
        nonlocal size
        if given not in known:
            if size > _REMEMBERED:
                known.clear()
                size = 0
            known[given] = redactor.text(given)
            size += len(given)
        return known[given]

    remembering = copy(redactor)
    remembering.text = text  # type: ignore[method-assign, assignment]
    return remembering


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return  # not on Windows
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigurationError(f"this import is running already, in {str(folder)!r}; wait for it.") from error


def _reason(error: Exception) -> str:
    """Why something could not be read; without values, so that reasons can be counted."""
    if isinstance(error, InputError):
        return str(error).partition("; in ")[0]
    return f"not as the format has it: {type(error).__name__} {error}"[:200]


def _json(value: Any) -> bytes:
    return json.dumps(value, default=str).encode()
