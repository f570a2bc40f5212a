"""LangGraph checkpointers, read directly: a SQLite file, or a Postgres database by its address.

Each thread is a conversation: the messages of its latest checkpoint. Turns begin where a checkpoint's source is
`input`, at the time that its id (a UUID of version 6) holds. The database is opened for reading only, and values are
decoded with the safe types alone: a checkpoint that somebody else wrote runs no code here.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from langchain_core.messages import BaseMessage, message_to_dict
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer

from metis_agent.errors import InputError, MissingDependencyError, StorageError
from metis_agent.traces.messages import messages_of
from metis_agent.traces.reading import BadRecord, Record
from metis_agent.traces.registry import Importer, Trace

__all__ = ["LangGraph"]

_POSTGRES = ("postgres://", "postgresql://")
_THREADS = "SELECT DISTINCT thread_id FROM checkpoints WHERE checkpoint_ns = '' ORDER BY thread_id"
_STEPS = (
    "SELECT checkpoint_id, metadata FROM checkpoints WHERE thread_id = {} AND checkpoint_ns = '' ORDER BY checkpoint_id"
)
_NEWEST = 4
_EPOCH = 0x01B21DD213814000
"""Of UUIDs: 1582, in tenths of a microsecond before 1970."""


class LangGraph(Importer):
    """Threads of a LangGraph checkpointer."""

    name = "langgraph"
    title = "a LangGraph checkpointer: a SQLite file, or postgresql://user@host/database"
    source = "https://docs.langchain.com/oss/python/langgraph/persistence"
    versions = "langgraph-checkpoint-sqlite 3, langgraph-checkpoint-postgres 3; checkpoints of version 1 to 4"
    stable = False

    def opens(self, place: str, start: bytes) -> bool:
        """A SQLite file by its first bytes, a database by its address."""
        return start.startswith(b"SQLite format 3\0") or place.startswith(_POSTGRES)

    def records(self, place: str, skip: int) -> Iterator[Record | BadRecord]:
        """One record a thread: its id, messages, and the times of its turns."""
        with _opened(place) as (saver, query):
            threads = [str(thread) for (thread,) in query(_THREADS, ())]
            for number, thread in enumerate(threads, start=1):
                if number <= skip:
                    continue
                try:
                    found = saver.get_tuple({"configurable": {"thread_id": thread, "checkpoint_ns": ""}})
                    values = _values(found.checkpoint) if found is not None else {}
                    times = list(_times(query(_STEPS, (thread,))))
                    yield Record(number=number, value={"thread_id": thread, "times": times, "messages": _said(values)})
                except (InputError, ValueError, TypeError, KeyError) as error:
                    yield BadRecord(number=number, reason=f"the thread's checkpoint can't be read: {error}")

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Never: a checkpointer is known by its place."""
        return False

    def parts(self, record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """A thread is one part."""
        yield str(record["thread_id"]), record

    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """The thread's conversation."""
        for part in parts:
            trace = Trace(id=key, source=self.name, every_turn=True, conversation=key)
            trace.messages = messages_of(part["messages"], trace.odd)
            trace.times = [(float(start), float(end)) for start, end in part["times"]]
            yield trace


@contextmanager
def _opened(place: str) -> Iterator[tuple[BaseCheckpointSaver[Any], Any]]:
    """The checkpointer, and a function that asks its database."""
    serde = JsonPlusSerializer(allowed_msgpack_modules=None)
    try:
        with (_postgres if place.startswith(_POSTGRES) else _sqlite)(place, serde) as found:
            yield found
    except ImportError as missing:
        raise MissingDependencyError(
            f"a checkpointer is read by the package that wrote it, and {missing.name!r} is not installed: "
            "pip install 'langgraph-metis[traces]'"
        ) from missing


@contextmanager
def _postgres(place: str, serde: JsonPlusSerializer) -> Iterator[tuple[BaseCheckpointSaver[Any], Any]]:
    import psycopg
    from langgraph.checkpoint.postgres import PostgresSaver
    from psycopg.rows import dict_row

    read_only = "-c default_transaction_read_only=on"
    try:
        with psycopg.connect(
            place, autocommit=True, prepare_threshold=0, row_factory=dict_row, options=read_only
        ) as server:  # fmt: skip
            yield (
                PostgresSaver(server, serde=serde),
                lambda query, values: [
                    tuple(row.values()) for row in server.execute(query.replace("{}", "%s"), values).fetchall()
                ],
            )
    except psycopg.Error as error:
        raise StorageError(f"the database can't be read: {error}. Check the address and the rights to it.") from error


@contextmanager
def _sqlite(place: str, serde: JsonPlusSerializer) -> Iterator[tuple[BaseCheckpointSaver[Any], Any]]:
    from langgraph.checkpoint.sqlite import SqliteSaver

    file = sqlite3.connect(f"{Path(place).absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    try:
        saver = SqliteSaver(file, serde=serde)
        saver.is_setup = True  # it would write its tables
        yield saver, lambda query, values: file.execute(query.replace("{}", "?"), values).fetchall()
    except sqlite3.Error as error:
        raise StorageError(f"{place!r} can't be read as a LangGraph checkpointer: {error}.") from error
    finally:
        file.close()


def _values(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    if checkpoint["v"] > _NEWEST:
        raise InputError(f"its version is {checkpoint['v']}, newer than this importer: it reads up to {_NEWEST}")
    values: Mapping[str, Any] = checkpoint["channel_values"]
    return values


def _said(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a state, in the channel that has them."""
    named = values.get("messages")
    for said in (named, *values.values()):
        if isinstance(said, list) and said and all(isinstance(message, BaseMessage) for message in said):
            return [message_to_dict(message) for message in said]
    raise InputError("no channel of it holds messages")


def _times(steps: Iterable[tuple[str, Any]]) -> Iterator[tuple[float, float]]:
    """Begin and end of each turn: from an input's checkpoint to the last before the next input."""
    begin = end = None
    for id_, metadata in steps:
        found = json.loads(metadata) if isinstance(metadata, str | bytes) else metadata or {}
        at = _time(id_)
        if found.get("source") == "input":
            if begin is not None and end is not None:
                yield begin, end
            begin = at
        end = at
    if begin is not None and end is not None:
        yield begin, end


def _time(checkpoint_id: str) -> float:
    whole = UUID(checkpoint_id).int
    ticks = (whole >> 80) << 12 | (whole >> 64) & 0xFFF
    return (ticks - _EPOCH) / 1e7
