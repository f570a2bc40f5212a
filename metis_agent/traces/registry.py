"""The formats that `metis import` reads, and how to add one.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.traces.reading import BadRecord, Record, records_of
from metis_agent.traces.traced import Trace

__all__ = ["ENTRY_POINTS", "Importer", "importer", "importer_names", "recognised", "register_importer"]

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
    "anthropic": f"{_PACKAGE}.anthropic:Anthropic",
    "openai": f"{_PACKAGE}.openai:OpenAI",
    "langgraph": f"{_PACKAGE}.langgraph:LangGraph",
    "langchain": f"{_PACKAGE}.langchain:LangChain",
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
        keys = ", ".join(sorted(map(str, records[0]))[:12]) if records else "none"
        raise InputError(
            f"{place!r} has no format that is known: its first record has the keys {keys}. "
            f"Name the format with --format ({', '.join(importer_names())}), or register an importer."
        )
    return best
