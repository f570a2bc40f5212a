"""Opening SQLite: the one place that says how the package's indexes and caches use it.

Every connection commits by itself (`BEGIN` where a transaction is meant), and may pass from thread to thread, one
thread at a time. What differs is how much of a file has to survive.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Literal

from metis_agent.errors import StorageError

__all__ = ["Survives", "open_database", "open_frozen"]

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
