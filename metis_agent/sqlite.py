"""SQLite as the package's indexes and caches use it.

Every connection commits by itself (`BEGIN` where a transaction is meant), and may pass from thread to thread, one
thread at a time. What differs is how much of a file has to survive.

`DiskCache` keeps what was asked once and need not be asked again, by the hash of its content: a judge's verdicts (each
costs money), probes of the base model, re-executed tool calls. It holds JSON, never pickle; what is in it survives a
kill -9; several threads and processes may share it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from metis_agent import formats
from metis_agent.errors import StorageError

__all__ = ["DiskCache", "Survives", "check_database", "content_key", "open_database", "open_frozen"]

Survives = Literal["power loss", "kill", "nothing"]

_PRAGMAS: dict[Survives, tuple[str, ...]] = {
    # A write-ahead log outlives the death of the process, which is what a resumed run needs.
    "power loss": ("journal_mode = WAL", "synchronous = NORMAL"),
    "kill": ("journal_mode = WAL", "synchronous = OFF"),
    # What is cut short is thrown away, so it needs neither a journal nor the disk's word.
    "nothing": ("journal_mode = OFF", "synchronous = OFF"),
}
_BUSY_SECONDS = 60.0


def open_database(path: str | os.PathLike[str] | None = None, *, survives: Survives) -> sqlite3.Connection:
    """Open a database to write to, and make it where there is none.

    Args:
        path: A local file, whose folder is made as well; `None` for memory.
        survives: What committed work outlives: the machine, the process, or not even that.

    Raises:
        StorageError: The file can't be opened or written, or is something else.
    """
    connection: sqlite3.Connection | None = None
    try:
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        where = ":memory:" if path is None else os.fspath(path)
        connection = sqlite3.connect(where, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        for pragma in _PRAGMAS[survives]:
            connection.execute(f"PRAGMA {pragma}")
    except (OSError, sqlite3.Error) as error:
        if connection is not None:
            connection.close()
        raise StorageError(
            f"the database {str(path)!r} can't be used: {error}. Name a file that this user may write to, or remove "
            "it: what it holds is then made anew."
        ) from error
    return connection


def open_frozen(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """Open a database that is replaced whole and never changed: no locks, and a read-only disk will do.

    Raises:
        sqlite3.Error: It can't be opened; whether it is a database shows at the first query.
    """
    connection = sqlite3.connect(
        f"{Path(path).absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute(f"PRAGMA mmap_size = {2**30}")
    return connection


_ASKED_AT_ONCE = 500


def content_key(*parts: Any) -> str:
    """A hash of values that JSON can hold; equal values, equal key, on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def check_database(connection: sqlite3.Connection, path: str) -> None:
    """Mark a new SQLite file with its version, and refuse one that a newer Metis wrote.

    Raises:
        SchemaVersionError: it is newer.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    formats.check_number(version or formats.CACHE, formats.CACHE, repr(path))
    if not version:
        connection.execute(f"PRAGMA user_version = {formats.CACHE}")


class DiskCache:
    """JSON values by key, in one local file.

    Args:
        path: the file; `None` keeps everything in memory, for as long as the object lives.

    Raises:
        StorageError: the file can't be opened or written, or is something else.
        SchemaVersionError: a newer Metis wrote it.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._path = ":memory:" if path is None else str(Path(path))
        self._lock = threading.Lock()
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=60)
            # A write-ahead log outlives the death of the process, which is what a resumed run needs.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS entry (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"the cache {self._path!r} can't be used: {error}. Name a file that this user may write to, "
                "or remove it: what it holds will then be asked anew."
            ) from error
        check_database(self._connection, self._path)

    def get(self, key: str) -> Any | None:
        """The value, or `None`."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values that are there, by key."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Any]()
        with self._lock:
            for start in range(0, len(wanted), _ASKED_AT_ONCE):
                part = wanted[start : start + _ASKED_AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = self._run(f"SELECT key, value FROM entry WHERE key IN ({marks})", part)
                found |= {key: json.loads(value) for key, value in rows}
        return found

    def put(self, key: str, value: Any) -> None:
        """Keep a value; an earlier one is replaced."""
        self.put_many({key: value})

    def put_many(self, values: Mapping[str, Any]) -> None:
        """Keep several, all or none.

        Raises:
            StorageError: the disk is full, for instance.
        """
        if not values:
            return
        rows = [(key, json.dumps(value)) for key, value in values.items()]
        with self._lock:
            self._run("BEGIN IMMEDIATE")
            try:
                for row in rows:
                    self._run("INSERT OR REPLACE INTO entry VALUES (?, ?)", row)
                self._run("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    def __len__(self) -> int:
        with self._lock:
            return int(self._run("SELECT count(*) FROM entry")[0][0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, statement: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(statement, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise StorageError(
                f"the cache {self._path!r} failed: {error}. Make room or mend the folder, then run again."
            ) from error
