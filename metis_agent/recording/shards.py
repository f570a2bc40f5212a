"""Shards of a store and the folder that they are in: local, or on any fsspec file system.

The trajectory store and the image store share the folder: list, read in blocks, put a whole file. A shard belongs to
one process, so that many can write to one store at once. Local shards are appended to, line by line; object stores
can't append, so there lines are gathered and go up as whole shards.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from metis_agent.errors import ConfigurationError, MissingDependencyError, StorageError
from metis_agent.formats import atomic_write

__all__ = ["LocalShards", "RemoteShards", "ShardWriter", "Storage", "is_shard"]

_BLOCK = 2**20


class Storage:
    """One folder, named by a path or an fsspec URL.

    Raises:
        ConfigurationError: the URL's file system is unknown.
        MissingDependencyError: it is known, but its package isn't installed.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self._options = dict(storage_options or {})
        if not self.url:
            raise ConfigurationError("a store's address is empty (''); give a folder or an fsspec URL.")
        self.reconnect()

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine, where files can be appended to and renamed."""
        return isinstance(self.fs, LocalFileSystem)

    def reconnect(self) -> None:
        """Take a file system of this process: after a fork the parent's connections can't be used."""
        try:
            fs, root = url_to_fs(self.url, **self._options)
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.url!r} needs a package that isn't installed: {error}. Install it with pip, or use a local path."
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{self.url!r} is no address: {error}. Give a path or a URL that fsspec knows, such as s3://bucket/runs."
            ) from error
        self.fs = cast(AbstractFileSystem, fs)
        self.root = str(root).rstrip("/")

    def check_exists(self) -> None:
        """Raise StorageError where there is no such folder."""
        try:
            if self.fs.isdir(self.root or "/"):
                return
            reason = "there is no such folder"
        except Exception as error:  # each file system has exceptions of its own
            reason = str(error)
        raise StorageError(f"{self.url!r} can't be read: {reason}. Check the address; a first run makes it.")

    def names(self) -> list[str]:
        """Return the names of the files in the folder, unsorted; none where there is no folder yet."""
        try:
            self.fs.invalidate_cache(self.root)
            return [str(path).rpartition("/")[2] for path in self.fs.ls(self.root or "/", detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:
            raise StorageError(f"{self.url!r} can't be listed: {error}. Check the rights to it.") from error

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in blocks of a mebibyte.

        Raises:
            StorageError: it isn't there, or can't be read.
        """
        try:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except Exception as error:
            raise StorageError(f"{name!r} in {self.url!r} can't be read: {error}.") from error

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, `None` where it isn't there."""
        try:
            return int(self.fs.size(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise StorageError(f"{name!r} in {self.url!r} can't be read: {error}.") from error

    def put(self, name: str, content: bytes) -> None:
        """Write a whole file, so that a reader sees all of it or none.

        Raises:
            StorageError: it could not be written.
        """
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            if self.is_local:
                atomic_write(Path(self.root) / name, content)
            else:
                self.fs.pipe_file(f"{self.root}/{name}", content)  # object stores put whole or not at all
        except Exception as error:
            raise StorageError(
                f"{name!r} can't be written to {self.url!r}: {error}. "
                "Check the address, the rights to it, and that there is room."
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file, where the rights to it allow that."""
        with suppress(Exception):
            self.fs.rm_file(f"{self.root}/{name}")


class ShardWriter(Protocol):
    """Writes whole lines into shards, for several threads at once."""

    def append(self, line: bytes, *, wait: bool = False) -> None:
        """Add a line, its line break included; with `wait` it can be read once this returns."""

    def flush(self) -> None:
        """Make what was appended visible to readers."""

    def close(self) -> None:
        """Flush and let go of the shard; a later append opens another."""

    def forget(self) -> None:
        """In a forked child: drop what belongs to the parent, unwritten."""


def is_shard(name: str) -> bool:
    """True for the file names that shards have."""
    return name.startswith("segment-") and name.endswith(".jsonl")


class LocalShards:
    """Shards in a local folder; a line is in the file, whole, once `append` returns.

    Each line is one `write` on a descriptor in append mode, with no buffer of ours in between: the death of
    the process loses nothing. With `fsync`, nor does the death of the machine.

    Raises:
        StorageError: nothing can be written to the folder.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, fsync: bool) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._fsync = fsync
        self._fd: int | None = None
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\n")
        except OSError as error:
            raise StorageError(
                f"trajectories can't be written to {str(folder)!r}: {error.strerror or error}. "
                "Name a folder that this user may write to, on a disk with room."
            ) from error

    def append(self, line: bytes, *, wait: bool = False) -> None:
        """Write the line, or, where it can't be written whole, none of it."""
        with self._lock:
            self._append(line)

    def _append(self, line: bytes) -> None:
        try:
            fd, size = self._shard(len(line))
        except OSError as error:
            raise self._failure(error) from error
        try:
            written = os.write(fd, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted")
            if self._fsync:
                os.fsync(fd)
        except OSError as error:
            self._cut_back(fd, size)
            raise self._failure(error) from error

    def flush(self) -> None:
        """Nothing to do: each line is in the file already."""

    def close(self) -> None:
        """Close the open shard, if any."""
        with self._lock:
            self._close()

    def forget(self) -> None:
        """Close this process's copy of the descriptor; the parent's stays open."""
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with suppress(OSError):
                os.close(fd)

    def _shard(self, incoming: int) -> tuple[int, int]:
        """Return the open shard and its size; start another one where this one is full."""
        if self._fd is not None:
            # Asked of the file, not counted here: an interrupt between write and count can't put it wrong.
            size = os.fstat(self._fd).st_size
            if size == 0 or size + incoming <= self._shard_bytes:
                return self._fd, size
            self._close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._fd = os.open(self._folder / _shard_name(), flags, 0o666)
        if self._fsync:
            _fsync_folder(self._folder)
        return self._fd, 0

    def _cut_back(self, fd: int, size: int) -> None:
        """Take a partial line off the end; where that fails too, leave it the last line of its shard."""
        try:
            os.ftruncate(fd, size)
        except OSError:
            self._close()

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"a trajectory could not be written to {str(self._folder)!r}: {error.strerror or error}. "
            "It was left out whole; free some space or mend the folder, then append it again."
        )


class RemoteShards:
    """Shards on any fsspec file system, uploaded whole: when full, on flush and on close, or line by line.

    Who waits for his line waits for one upload at a time, and what other threads have added meanwhile goes up with the
    next one: many at once are no slower, and make no more files, than few.

    Raises:
        StorageError: nothing can be written there.
    """

    def __init__(self, storage: Storage, *, shard_bytes: int) -> None:
        self._storage = storage
        self._shard_bytes = shard_bytes
        self.forget()
        probe = f".probe-{secrets.token_hex(4)}"
        storage.put(probe, b"\n")
        storage.remove(probe)

    def append(self, line: bytes, *, wait: bool = False) -> None:
        """Keep the line for the next upload, or upload it now; upload first where the shard is full."""
        if self._open.size and self._open.size + len(line) > self._shard_bytes:
            self.flush()
        with self._lock:
            batch = self._open
            batch.add(line, wait=wait)
        if wait:
            self._upload(batch)

    def flush(self) -> None:
        """Upload what is kept as one shard."""
        self._upload(self._open)

    def close(self) -> None:
        """Upload what is kept."""
        self.flush()

    def forget(self) -> None:
        """Drop what is kept."""
        self._open = _Batch()
        self._lock, self._uploading = threading.Lock(), threading.Lock()

    def _upload(self, batch: _Batch) -> None:
        with self._uploading:
            if batch is not self._open:  # another thread has uploaded it, or tried to
                if batch.failure is not None:
                    raise batch.failure
                return
            with self._lock:
                self._open = _Batch()
            if not batch.lines:
                return
            try:
                self._storage.put(_shard_name(), b"".join(line for line, _ in batch.lines))
            except BaseException as error:
                batch.failure = error if isinstance(error, StorageError) else StorageError(str(error))
                with self._lock:  # what nobody waits for is tried again with the next upload
                    self._open.lines[:0] = [(line, wait) for line, wait in batch.lines if not wait]
                    self._open.size = sum(len(line) for line, _ in self._open.lines)
                raise


class _Batch:
    """Lines that go up together, each with whether somebody waits for it."""

    def __init__(self) -> None:
        self.lines: list[tuple[bytes, bool]] = []
        self.size = 0
        self.failure: StorageError | None = None

    def add(self, line: bytes, *, wait: bool) -> None:
        """Add a line."""
        self.lines.append((line, wait))
        self.size += len(line)


def _shard_name() -> str:
    # The time first, so that sorting by name is the order of writing.
    return f"segment-{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"


def _fsync_folder(folder: Path) -> None:
    """Make a new file's name durable; Windows has no such call."""
    with suppress(PermissionError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
