"""Trajectories on disk, or on any fsspec file system: a folder of append-only JSONL shards, images once beside them.

Written by the recorder, from many threads and processes at once; read by curation and training, and by a
resumed run that asks which questions are done. Bad lines are data too: a write that a crash cut short must
not stop a training run, nor go unnoticed: such lines are skipped, counted and logged with their place.

`spread` runs one function over many parts, such as a store's shards: here, one after another, or on a Ray cluster.
The parts and their order are the same either way, so the result is too, to the byte. What runs elsewhere only reads;
what is written is written here. So a worker that dies costs its part's work, which Ray does again, and nothing else.
"""

from __future__ import annotations

import base64
import logging
import os
import pickle
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from metis_agent.errors import (
    ConfigurationError,
    InputError,
    MetisError,
    MissingDependencyError,
    SchemaVersionError,
    StorageError,
)
from metis_agent.recording import schema
from metis_agent.recording.images import (
    MOST_RESTORED,
    ImageStore,
    RestoreImages,
    ToolSets,
    externalise_images,
    may_hold_references,
)
from metis_agent.recording.shards import LocalShards, RemoteShards, ShardWriter, Storage, is_shard
from metis_agent.types import Trajectory

__all__ = ["BadLine", "StoreReport", "TrajectoryStore", "connected", "spread"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
A = TypeVar("A")
B = TypeVar("B")
_MAX_LINE = 256 * 2**20
_RECENT_IMAGES = 128 * 2**20
"""Characters of images that are kept while a store is read: one picture stands in many records that follow."""
_TOO_LONG = b"line over the limit: "
_KEPT_BAD_LINES = 100
_LONGEST_REASON = 500


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that was skipped, and why."""

    shard: str
    line: int
    """Counted from 1."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What the latest `read` of a store has met so far."""

    read: int = 0
    torn: int = 0
    """Last lines that a crash cut short."""
    corrupt: int = 0
    """Other lines that are no trajectory."""
    bad_lines: tuple[BadLine, ...] = ()
    """The first 100 of both kinds."""


@dataclass
class Tally:
    """The counts of one `read`, as it goes."""

    read: int = 0
    torn: int = 0
    corrupt: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)

    def skip(self, shard: str, line: int, reason: str, *, torn: bool) -> None:
        """Count a bad line, and say where it is."""
        self.torn += torn
        self.corrupt += not torn
        reason = reason[:_LONGEST_REASON]
        if len(self.bad_lines) < _KEPT_BAD_LINES:
            self.bad_lines.append(BadLine(shard=shard, line=line, reason=reason))
        _log.warning("skipped %s, line %d: %s", shard, line, reason)

    def report(self) -> StoreReport:
        """Return the counts as they stand."""
        return StoreReport(read=self.read, torn=self.torn, corrupt=self.corrupt, bad_lines=tuple(self.bad_lines))


class TrajectoryStore:
    """A folder of trajectories, appended to by many and read in a stable order.

    Args:
        url: a folder, or any fsspec URL (`s3://bucket/runs`, `memory://runs`).
        read_only: don't check that it can be written to, and refuse to append.
        shard_bytes: size at which a new shard is begun.
        fsync: wait for the disk at each append, so that power loss loses nothing (local folders only).
        storage_options: keywords for the fsspec file system, such as credentials.

    An image is one file in the folder `images`, however often it stands in records, and a set of tools that was
    offered one in the folder `tools`; `read` puts them back.
    Local appends are safe once they return. On other file systems lines wait in memory for `flush`, a full
    shard or `close`: use the store in a `with` block there, or append with `wait=True`, as a `Recorder` does.

    Raises:
        ConfigurationError: the URL's file system is unknown or not installed.
        StorageError: the place can't be written to; with `read_only`, it isn't there.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        read_only: bool = False,
        shard_bytes: int = 64 * 2**20,
        fsync: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._storage = Storage(url, storage_options)
        self._open_images = partial(ImageStore, url, storage_options=storage_options)
        self._images = self._open_images()
        self._open_tools = partial(ToolSets, url, storage_options=storage_options)
        self._tools = self._open_tools()
        self._tally = Tally()
        self._writer: ShardWriter | None = None
        self._reopen = partial(
            TrajectoryStore,
            url,
            read_only=read_only,
            shard_bytes=shard_bytes,
            fsync=fsync,
            storage_options=storage_options,
        )
        if read_only:
            self._storage.check_exists()
        elif self._storage.is_local:
            self._writer = LocalShards(Path(self._storage.root), shard_bytes=shard_bytes, fsync=fsync)
        else:
            self._writer = RemoteShards(self._storage, shard_bytes=shard_bytes)
        if self._writer is not None:
            weakref.finalize(self, self._writer.close)
            _open_stores.add(self)

    @property
    def url(self) -> str:
        """Where the shards are."""
        return self._storage.url

    @property
    def report(self) -> StoreReport:
        """What the latest `read` has met so far; complete once its iterator is exhausted."""
        return self._tally.report()

    def append(self, trajectory: Trajectory, *, wait: bool = False) -> None:
        """Add a trajectory; from any thread.

        Args:
            trajectory: what to add.
            wait: until it is uploaded, where this is no local folder; what several threads add at once goes together.

        Raises:
            InputError: it holds a value that JSON has no form for.
            StorageError: it could not be written; nothing of it is left in the store.
        """
        writer = self._require_writer()
        tools = self._tools.put(trajectory.tools)
        whole = schema.dumps(replace(trajectory, tools=tools) if tools else trajectory).encode() + b"\n"
        line = whole if len(whole) > MOST_RESTORED else externalise_images(whole, self._images.put_image)
        if len(line) > _MAX_LINE:
            raise InputError(
                f"trajectory {trajectory.id!r} takes {len(line)} bytes; a line holds at most {_MAX_LINE}, and "
                f"{MOST_RESTORED} with its images. Record what is so large elsewhere, and its place here."
            )
        writer.append(line, wait=wait)

    def flush(self) -> None:
        """Upload what still waits in memory; nothing to do for a local folder."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and let go of the open shard; a later append begins another."""
        if self._writer is not None:
            self._writer.close()

    def shards(self) -> list[str]:
        """Return the names of the shards, oldest first."""
        return sorted(filter(is_shard, self._storage.names()))

    def read(
        self, *, from_shard: str | None = None, only_shard: str | None = None, whole: bool = True
    ) -> Iterator[Trajectory]:
        """Stream all trajectories, shards by name and lines in order, one in memory at a time.

        Args:
            from_shard: the shard to begin with (see `shards`); earlier ones are left out.
            only_shard: the shard to read alone.
            whole: without it they come without messages, model calls and tools, several times as fast.

        Raises:
            StorageError: a shard can't be read.
            SchemaVersionError: a record was written by a newer Metis.
        """
        self._tally = Tally()
        names = [name for name in self.shards() if from_shard is None or name >= from_shard]
        names = names if only_shard is None else [only_shard]
        loads = schema.loads if whole else schema.loads_outcome
        images = _RecentImages(self._encoded)

        def parse(line: bytes) -> Trajectory:
            trajectory = loads(line, RestoreImages(images.get) if may_hold_references(line) else None)
            return self._with_tools(trajectory) if trajectory.tools else trajectory

        return self._parsed(names, parse, self._tally)

    def ids(self, *, besides: Collection[str] = ()) -> set[str]:
        """Return the ids of the finished trajectories: what a resumed run may leave out.

        Args:
            besides: shards that are not looked at.
        """
        heads = self._parsed([name for name in self.shards() if name not in besides], schema.identity, Tally())
        return {RestoreImages(lambda _: None)(id_) for id_, status in heads if status == "finished"}

    def count(self) -> int:
        """Return the number of whole lines, without parsing them: bad ones count too."""
        return sum(block.count(b"\n") for name in self.shards() for block in self._storage.blocks(name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TrajectoryStore({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()  # a spawned worker gets a writer of its own

    def _require_writer(self) -> ShardWriter:
        if self._writer is None:
            raise StorageError(f"{self.url!r} was opened with read_only=True; open it without to append.")
        return self._writer

    def _encoded(self, reference: str) -> str | None:
        try:
            if (self._images.size(reference) or 0) > _MAX_LINE // 2:
                raise StorageError(f"{reference!r} is larger than any that was recorded.")
            return base64.b64encode(self._images.get_image(reference)).decode()
        except StorageError as error:
            _log.warning("an image of %s is not put back: %s", self.url, error)
            return None

    def _with_tools(self, trajectory: Trajectory) -> Trajectory:
        try:
            tools = self._tools.get(trajectory.tools)
        except StorageError as error:
            _log.warning("%s has no tools: %s", trajectory.id, error)
            tools = ()
        return trajectory if tools is trajectory.tools else replace(trajectory, tools=tools)

    def _parsed(self, names: list[str], parse: Callable[[bytes], _T], tally: Tally) -> Iterator[_T]:
        for name in names:
            for number, (line, last) in enumerate(_lines(self._storage.blocks(name)), start=1):
                if not line.endswith(b"\n") and last:
                    tally.skip(name, number, "no line break: a write was cut short", torn=True)
                    continue
                try:
                    parsed = parse(line)
                except SchemaVersionError as error:
                    raise SchemaVersionError(f"{name} line {number}: {error}") from error
                except InputError as error:
                    tally.skip(name, number, str(error), torn=last and not schema.is_json(line))
                    continue
                tally.read += 1
                yield parsed

    def _after_fork(self) -> None:
        self._storage.reconnect()
        self._images, self._tools = self._open_images(), self._open_tools()
        if self._writer is not None:
            self._writer.forget()


def spread(
    function: Callable[[A], Iterable[B]], parts: Sequence[A], *, ray: str | None = None
) -> Iterator[Iterable[B]]:
    """Yield what the function makes of each part, in the parts' order.

    Args:
        function: Reads a part. On Ray it is sent to the workers, with what is bound to it.
        parts: What there is to read.
        ray: Address of a Ray cluster: "auto", "HOST:PORT" or "ray://HOST:PORT"; "local" starts one on this machine. By
            default all runs in this process, each part only as far as its results are taken.

    Raises:
        MissingDependencyError: the `ray` extra is not installed.
        ConfigurationError: there is no cluster at the address.
    """
    if ray is None or not parts:
        yield from map(function, parts)
        return
    with connected(ray) as data:
        folder = os.getcwd()

        def made(row: dict[str, Any]) -> dict[str, Any]:
            with suppress(OSError):  # there is no such folder on that machine
                os.chdir(folder)  # where paths are relative to
            try:
                return {"made": pickle.dumps(list(function(pickle.loads(row["part"]))))}
            except MetisError as error:  # to be read as it would be here, not as Ray wraps it
                return {"made": pickle.dumps(error)}

        packed = [{"part": pickle.dumps(part)} for part in parts]
        for row in data.from_items(packed, override_num_blocks=len(packed)).map(made).iter_rows():
            found = pickle.loads(row["made"])
            if isinstance(found, MetisError):
                raise found
            yield found


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray's data library, connected once for all that is spread within; what was started or joined is left at the end.

    Raises:
        MissingDependencyError, ConfigurationError: as `spread`.
    """
    if address is None:
        yield None
        return
    try:
        import ray
        from ray import data
    except ImportError as missing:
        raise MissingDependencyError(
            f"--ray {address!r} needs the extra `ray`: pip install 'langgraph-metis[ray]'"
        ) from missing
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # of grpc, of Ray, of the operating system
            raise ConfigurationError(
                f"there is no Ray cluster at {address!r}: {error}. Name a running one (`ray start --head`, then auto), "
                "or local for one on this machine."
            ) from error
    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    talk = logging.getLogger("ray.data")
    before = talk.level
    talk.setLevel(logging.ERROR)  # it tells of every part that is spread
    try:
        yield data
    finally:
        talk.setLevel(before)
        if joined:
            ray.shutdown()


class _RecentImages:
    """Images as base64, those of the records that were read last."""

    def __init__(self, load: Callable[[str], str | None]) -> None:
        self._load, self._kept, self._size = load, dict[str, str | None](), 0

    def get(self, reference: str) -> str | None:
        """The image; `None` where it is gone."""
        if reference not in self._kept:
            encoded = self._load(reference)
            if self._size > _RECENT_IMAGES:
                self._kept, self._size = {}, 0
            self._kept[reference] = encoded
            self._size += len(encoded or "") + len(reference)
        return self._kept[reference]


def _lines(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, its break included, and whether it is the last.

    A line over the limit is not gathered up; what stands for it is no JSON, so it is reported as bad.
    """
    held: bytes | None = None
    parts: list[bytes] = []
    length = 0
    for block in blocks:
        *whole, tail = block.split(b"\n")
        for piece in whole:
            if held is not None:
                yield held, False
            held = b"".join((*parts, piece, b"\n"))
            parts, length = [], 0
        length += len(tail)
        if length > _MAX_LINE:
            parts = [_TOO_LONG]
        elif tail:
            parts.append(tail)
    if held is not None:
        yield held, not parts
    if parts:
        yield b"".join(parts), True


_open_stores: weakref.WeakSet[TrajectoryStore] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_open_stores):
        store._after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which can't fork
    os.register_at_fork(after_in_child=_after_fork)
