"""What importers deliver: one trace as its model calls, tool runs and messages, whoever recorded it.

Between the importers, which know a format, and `assemble`, which makes trajectories and knows none.

The formats that `metis import` reads, and how to add one.

An importer knows one format: it recognises a record, says which trace each part of it belongs to, and makes traces of
what belongs together. Files, memory, order, secrets and the store are none of its business. Its own file states where
the format is documented and which versions it was written for.

Example:
    ```python
    from metis_agent.traces import Importer, Trace, register_importer

    class MyLogs(Importer):
        name, title, source, versions = "my-logs", "My logs", "our wiki", "2"

        def recognises(self, record):
            return record.get("logger") == "my-agent"

        def parts(self, record):
            yield record["session"], record

        def traces(self, key, parts):
            yield Trace(id=key, source=self.name, messages=[...], every_turn=True)

    register_importer("my-logs", MyLogs)
    ```
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.traces.messages import Message, Unreadable
from metis_agent.traces.reading import BadRecord, Record, records_of

__all__ = [
    "ENTRY_POINTS",
    "Importer",
    "ModelSpan",
    "ToolSpan",
    "Trace",
    "importer",
    "importer_names",
    "recognised",
    "register_importer",
]


@dataclass(kw_only=True)
class ModelSpan:
    """One call of a model."""

    id: str
    input: list[Message]
    """What the model read."""
    output: Message | None
    """What it replied; `None` where it failed, or where the record ends before."""
    name: str = ""
    """The graph node or function that asked."""
    parents: tuple[str, ...] = ()
    """Ids of the spans around it, outermost first."""
    model: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    start: float | None = None
    """Unix seconds."""
    end: float | None = None
    of_chunks: bool = False
    """The reply was put together from streamed chunks."""


@dataclass(kw_only=True)
class ToolSpan:
    """One run of a tool."""

    id: str
    name: str
    parents: tuple[str, ...] = ()
    call_id: str = ""
    arguments: Any = None
    content: Any = ""
    """What it gave: text or content blocks."""
    error: str = ""
    cost: float = 0.0
    start: float | None = None
    end: float | None = None


@dataclass(kw_only=True)
class Trace:
    """All that is known of one trace, or of one conversation."""

    id: str
    """Unique within its source; the same trace has the same id in every export."""
    source: str
    models: list[ModelSpan] = field(default_factory=list)
    tools: list[ToolSpan] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The conversation as the root gives it, or the log: with the final answer."""
    definitions: list[dict[str, Any]] = field(default_factory=list)
    """Tools offered, where no model call says it."""
    every_turn: bool = False
    """The trace is a conversation: each of its turns is a run, not only those with a model call."""
    every_thread: bool = False
    """Model calls that don't follow from each other are conversations of their own."""
    model: str = ""
    conversation: str = ""
    user: str = ""
    name: str = ""
    start: float | None = None
    end: float | None = None
    times: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each turn of a conversation, where they are known otherwise than from model calls."""
    error: str = ""
    ended: bool = True
    """False where the root is missing or had not ended when the export was made."""
    feedback: list[dict[str, Any]] = field(default_factory=list)
    """Each with `key`, and `score`, `value`, `comment` where given."""
    metadata: dict[str, Any] = field(default_factory=dict)
    odd: Unreadable = field(default_factory=Counter)
    """What was unusual and could be handled, counted."""


ENTRY_POINTS = "langgraph_metis.importers"
"""Entry point group in which another package names its importers."""


class Importer(ABC):
    """Reads one format. An instance lives as long as one import."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """Where the format is documented."""
    versions: ClassVar[str]
    """What it was written for and tested with."""

    stable: ClassVar[bool] = True
    """False for a source whose records may change while it is read, such as a server: a stopped import begins anew."""

    def opens(self, place: str, start: bytes) -> bool:
        """True for a place that `records` reads in its own way: a database, by its address or its first bytes."""
        return False

    def records(self, place: str, skip: int) -> Iterator[Record | BadRecord]:
        """Stream what is at a place, after so many records; files of JSONL, JSON and Parquet by default."""
        return records_of(place, skip=skip)

    @abstractmethod
    def recognises(self, record: Mapping[str, Any]) -> bool:
        """True where a record can only be of this format."""

    @abstractmethod
    def parts(self, record: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
        """Yield what is in a record (a line, a row), each with the key of the trace it belongs to.

        A part is plain JSON; parts of one key may stand anywhere in the export and come back together, in its order.

        Raises:
            InputError: the record is none of the format, or of a version that can't be read; says what and why.
        """

    @abstractmethod
    def traces(self, key: str, parts: Sequence[Mapping[str, Any]]) -> Iterable[Trace]:
        """Yield the traces of a key, as a rule one.

        Raises:
            InputError: they make no trace; says why. They are then kept apart, all of them.
        """


_PACKAGE = "metis_agent.traces.importers"
_IMPORTERS: dict[str, str | Callable[[], Importer]] = {
    "langsmith": f"{_PACKAGE}.langsmith:LangSmith",
    "langfuse": f"{_PACKAGE}.langfuse:Langfuse",
    "opentelemetry": f"{_PACKAGE}.opentelemetry:OpenTelemetry",
    "anthropic": f"{_PACKAGE}.message_logs:Anthropic",
    "openai": f"{_PACKAGE}.message_logs:OpenAI",
    "langgraph": f"{_PACKAGE}.langgraph:LangGraph",
    "langchain": f"{_PACKAGE}.message_logs:LangChain",
}


def register_importer(name: str, importer: Callable[[], Importer]) -> None:
    """Add a format, or replace one: a class, or a function that returns an importer.

    A package that is installed names its importers as entry points of the group `langgraph_metis.importers`.
    """
    _IMPORTERS[name] = importer


def importer_names() -> list[str]:
    """Return the names of all formats, those of other packages last."""
    return [*dict.fromkeys([*_IMPORTERS, *(point.name for point in entry_points(group=ENTRY_POINTS))])]


def importer(name: str) -> Importer:
    """Return the importer of a format.

    Raises:
        ConfigurationError: there is none of that name.
    """
    made = _IMPORTERS.get(name)
    if made is None:
        for point in entry_points(group=ENTRY_POINTS, name=name):
            made = point.load()
    if made is None:
        raise ConfigurationError(f"there is no importer {name!r}; there are: {', '.join(importer_names())}.")
    if isinstance(made, str):
        module, _, attribute = made.partition(":")
        made = getattr(import_module(module), attribute)
    found = made()
    assert isinstance(found, Importer)
    return found


def recognised(records: Sequence[Mapping[str, Any]], place: str) -> Importer:
    """Return the importer whose format the first records of a file have; of several, that which knows most of them.

    Raises:
        InputError: none knows any; names the formats and the keys that were seen.
    """
    best, most = None, 0
    for name in importer_names():
        candidate = importer(name)
        known = sum(candidate.recognises(record) for record in records)
        if known > most:
            best, most = candidate, known
    if best is None:
        seen = (
            f"its first record has the keys {', '.join(sorted(map(str, records[0]))[:12])}"
            if records
            else ("no record of JSON or Parquet is at its beginning")
        )
        raise InputError(
            f"{place!r} has no format that is known: {seen}. "
            f"Name the format with --format ({', '.join(importer_names())}), or register an importer."
        )
    return best
