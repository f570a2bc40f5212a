"""The local corpus: in SQLite FTS5, with nothing to install and no server, or in Tantivy.

Any term of a query may match (OR), ranked by BM25 with the title weighing more. Ranking every document that
holds "the" would take most of the time and change next to nothing, so candidates are the documents that hold
one of the query's rarer terms; its common terms still count in their ranking, exactly. That is the "common
terms query" of Lucene, with a budget in place of a fixed frequency.

Tantivy is an order of magnitude faster to ask, for 17 MB to install (the `tantivy` extra): for searches by the
thousand. Text is prepared by the same `terms`, so the same words find the same documents, ranked by BM25 as well.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from queue import LifoQueue
from typing import Any, Self

from metis_agent.errors import ConfigurationError, MissingDependencyError, StorageError
from metis_agent.formats import atomic_path
from metis_agent.sqlite import open_database, open_frozen
from metis_agent.tools.search.base import SearchHit
from metis_agent.tools.search.documents import (
    TOKENIZER,
    Document,
    digest_documents,
    digest_path,
    index_text,
    query_terms,
    read_documents,
)

__all__ = ["CorpusSearch", "TantivySearch"]

_APPLICATION_ID = 0x4D455449  # "METI"; how a file says that it is ours to replace
_FORMAT = 1
_CONNECTIONS = min(4, os.cpu_count() or 1)

_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
CREATE TABLE document (number INTEGER PRIMARY KEY, id TEXT, title TEXT, text TEXT, url TEXT);
CREATE VIRTUAL TABLE term USING fts5(title, text, content='', tokenize="{TOKENIZER}");
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(term, row);
CREATE TABLE common (term TEXT, documents INTEGER);
CREATE TABLE digest (digest TEXT);
INSERT INTO term(term, rank) VALUES ('hashsize', {2**24});
"""
_CANDIDATES = "SELECT rowid, rank FROM term WHERE term MATCH ? AND rank MATCH ? ORDER BY rank LIMIT ?"


class CorpusSearch:
    """Searches documents, from any number of threads; made by `build` or `from_path`."""

    def __init__(self, connections: Sequence[sqlite3.Connection], *, title_weight: float) -> None:
        if not 0.0 < title_weight < 1e6:
            raise ConfigurationError(f"title_weight is {title_weight!r}; it is a positive number, such as 3.0.")
        self._rank = f"bm25({float(title_weight)!r}, 1.0)"
        self._size = int(connections[0].execute("SELECT count(*) FROM document").fetchone()[0])
        self._common = dict(connections[0].execute("SELECT term, documents FROM common").fetchall())
        self._pool: LifoQueue[sqlite3.Connection] = LifoQueue()
        for connection in connections:
            self._pool.put(connection)
        self._closer = weakref.finalize(self, _close, connections)

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        *,
        index: str | os.PathLike[str] | None = None,
        title_weight: float = 3.0,
    ) -> Self:
        """Search these documents.

        Args:
            documents: what to search; read once.
            index: a file to keep the index in. It is built where there is none, or where the documents have
                changed, and used as it is otherwise; without it, the index is built in memory each time.
            title_weight: how much more a term counts in the title than in the text.

        Raises:
            ConfigurationError: `index` is a file of something else, or a setting is out of range.
            MissingDependencyError: Python's SQLite was built without FTS5.
            StorageError: the index can't be written or read.
        """
        if index is None:
            return cls(_in_memory(documents), title_weight=title_weight)
        listed = list(documents)  # gone through twice: for the digest, then for the index
        return cls(_in_file(Path(index), digest_documents(listed), lambda: listed), title_weight=title_weight)

    @classmethod
    def from_path(
        cls, path: str | Path, *, index: str | os.PathLike[str] | None = None, title_weight: float = 3.0
    ) -> Self:
        """Search a `.jsonl`, `.md` or `.txt` file, or a folder of them; see `read_documents`.

        Raises:
            ConfigurationError, InputError: as `read_documents`, and what `build` raises.
        """
        if index is None:
            return cls(_in_memory(read_documents(path)), title_weight=title_weight)
        opened = _in_file(Path(index), digest_path(path), lambda: read_documents(path))
        return cls(opened, title_weight=title_weight)

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return at most `limit` documents that hold any term of the query, best first."""
        terms = query_terms(query)
        if not terms or limit < 1:
            return []
        rare, common = self._split(terms)
        with self._connection() as connection:
            scores = self._ranked(connection, rare, limit)
            if common:
                # The same documents, those that hold a common term too: now with their whole score.
                for number, score in self._ranked(connection, f"({rare}) AND ({common})", limit).items():
                    scores[number] = max(score, scores.get(number, score))
            best = sorted(scores, key=lambda number: (-scores[number], number))[:limit]
            return [self._hit(connection, number, scores[number]) for number in best]

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`, in a thread: reading a database blocks, and an event loop is not to be blocked."""
        return await asyncio.to_thread(self.search, query, limit)

    def close(self) -> None:
        """Let go of the index; also done when the object goes."""
        self._closer()

    def __len__(self) -> int:
        return self._size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection; a thread that finds none waits for one."""
        connection = self._pool.get()
        try:
            yield connection
        finally:
            self._pool.put(connection)

    def _split(self, terms: dict[str, str]) -> tuple[str, str]:
        """Return FTS5 expressions for the rarest terms, within the budget, and for the others."""
        left = _budget(self._size)
        by_rarity = sorted(terms, key=lambda term: self._common.get(term, 0))
        rare: list[str] = []
        for term in by_rarity:
            left -= self._common.get(term, 0)
            if rare and left < 0:
                break
            rare.append(term)
        # BM25 in SQLite gives a term of more than half the documents no weight: leave it out.
        others = [term for term in by_rarity[len(rare) :] if self._common.get(term, 0) * 2 <= self._size]
        return " OR ".join(terms[term] for term in rare), " OR ".join(terms[term] for term in others)

    def _ranked(self, connection: sqlite3.Connection, expression: str, limit: int) -> dict[int, float]:
        rows = connection.execute(_CANDIDATES, (expression, self._rank, limit))
        return {number: -rank for number, rank in rows}

    def _hit(self, connection: sqlite3.Connection, number: int, score: float) -> SearchHit:
        row = connection.execute("SELECT id, title, text, url FROM document WHERE number = ?", (number,))
        id_, title, text, url = row.fetchone()
        return SearchHit(title=title, text=text, url=url, source=id_, score=score)


def _budget(size: int) -> int:
    """Return how many postings of the rarer terms are ranked: most of a small corpus, 4% of a large one.

    Measured on Zipf-distributed text against ranking everything: 98% of the five best are the same (the rest
    are near-ties), in a tenth of the time.
    """
    return 500 + size // 25


def _in_memory(documents: Iterable[Document]) -> list[sqlite3.Connection]:
    connection = open_database(survives="nothing")
    try:
        _build(connection, documents, digest="")
    except BaseException:
        connection.close()
        raise
    return [connection]


def _in_file(path: Path, digest: str, documents: Callable[[], Iterable[Document]]) -> list[sqlite3.Connection]:
    path = path.absolute()
    if _stored_digest(path) != digest:
        _build_file(path, documents(), digest)
    return [open_frozen(path) for _ in range(_CONNECTIONS)]


def _close(connections: Sequence[sqlite3.Connection]) -> None:
    for connection in connections:
        connection.close()


def _stored_digest(path: Path) -> str | None:
    """Return what the index at `path` was built from; `None` where there is none, or an older one."""
    if not path.exists():
        return None
    try:
        connection = open_frozen(path)
        try:
            owner = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if owner == _APPLICATION_ID:
                row = connection.execute("SELECT digest FROM digest").fetchone() if version == _FORMAT else None
                return str(row[0]) if row else None
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(
            f"index {str(path)!r} can't be opened: {error}. Name another path, or remove it to build it anew."
        ) from error
    raise ConfigurationError(f"index {str(path)!r} is a file of something else; name another path.")


def _build_file(path: Path, documents: Iterable[Document], digest: str) -> None:
    """Other processes see the old index or the new one, both whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, closing(open_database(beside, survives="nothing")) as connection:
            _build(connection, documents, digest)
    except (OSError, sqlite3.Error) as error:
        if isinstance(error, MissingDependencyError):
            raise
        cause = (isinstance(error, StorageError) and error.__cause__) or error
        raise StorageError(
            f"index {str(path)!r} can't be written: {cause}. Name a path that this user may write to."
        ) from error


def _build(connection: sqlite3.Connection, documents: Iterable[Document], digest: str) -> None:
    try:
        connection.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        if "fts5" not in str(error):
            raise
        raise MissingDependencyError(
            f"Python's SQLite has no full-text search ({error}). Use a Python built with FTS5, "
            "such as those of python.org, conda and uv."
        ) from error
    connection.execute("BEGIN")
    for number, document in enumerate(documents, start=1):
        stored = (number, *map(_storable, (document.id, document.title, document.text, document.url)))
        connection.execute("INSERT INTO document VALUES (?, ?, ?, ?, ?)", stored)
        indexed = (number, index_text(document.title), index_text(document.text))
        connection.execute("INSERT INTO term(rowid, title, text) VALUES (?, ?, ?)", indexed)
    connection.execute("INSERT INTO term(term) VALUES ('optimize')")
    # A rarer term can't strain the budget much, so its count is taken for zero.
    connection.execute(
        "INSERT INTO common SELECT term, doc FROM vocabulary WHERE doc > (SELECT 20 + count(*) / 200 FROM document)"
    )
    connection.execute("INSERT INTO digest VALUES (?)", (digest,))
    connection.execute("COMMIT")


def _storable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_TOKENIZER = "metis"
_FIELDS = ("title", "text")


class TantivySearch:
    """Searches documents in memory, from any number of threads; made by `build` or `from_path`."""

    def __init__(self, documents: Sequence[Document], index: Any, analyzer: Any, *, title_weight: float) -> None:
        self._tantivy = _import()
        self._documents = documents
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyzer = analyzer
        self._weights = {"title": title_weight, "text": 1.0}

    @classmethod
    def build(cls, documents: Iterable[Document], *, title_weight: float = 3.0) -> Self:
        """Search these documents.

        Args:
            documents: what to search; read once.
            title_weight: how much more a term counts in the title than in the text.

        Raises:
            MissingDependencyError: `tantivy` is not installed.
            ConfigurationError: `title_weight` is not a positive number.
        """
        if not 0.0 < title_weight < 1e6:
            raise ConfigurationError(f"title_weight is {title_weight!r}; it is a positive number, such as 3.0.")
        tantivy = _import()
        schema = tantivy.SchemaBuilder()
        for field in _FIELDS:
            schema.add_text_field(field, tokenizer_name=_TOKENIZER, index_option="freq")
        schema.add_unsigned_field("number", stored=True)
        index = tantivy.Index(schema.build())
        analyzer = _analyzer(tantivy)
        index.register_tokenizer(_TOKENIZER, analyzer)
        writer = index.writer()
        kept = list(documents)
        for number, document in enumerate(kept):
            title, text = _indexed(document.title), _indexed(document.text)
            writer.add_document(tantivy.Document(title=[title], text=[text], number=[number]))
        writer.commit()
        writer.wait_merging_threads()
        index.reload()
        return cls(kept, index, analyzer, title_weight=title_weight)

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], *, title_weight: float = 3.0) -> Self:
        """Search a `.jsonl`, `.md` or `.txt` file, or a folder of them; see `read_documents`.

        Raises:
            ConfigurationError, InputError: as `read_documents`, and what `build` raises.
        """
        return cls.build(read_documents(Path(path)), title_weight=title_weight)

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return at most `limit` documents that hold any term of the query, best first."""
        parts = [part for term, expression in query_terms(query).items() for part in self._parts(term, expression)]
        if not parts or limit < 1:
            return []
        wanted = self._tantivy.Query.boolean_query([(self._tantivy.Occur.Should, part) for part in parts])
        found = self._searcher.search(wanted, limit, count=False).hits
        return [self._hit(address, score) for score, address in found]

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`, in a thread: an event loop is not to be blocked."""
        return await asyncio.to_thread(self.search, query, limit)

    def __len__(self) -> int:
        return len(self._documents)

    def _parts(self, term: str, expression: str) -> list[Any]:
        """Return a query for each field; a single character of a script without spaces goes by prefix."""
        query = self._tantivy.Query
        parts = []
        for token in self._analyzer.analyze(term):
            for field, weight in self._weights.items():
                if expression.endswith("*"):
                    part = query.regex_query(self._schema, field, f"{token}.*")
                else:
                    part = query.term_query(self._schema, field, token, index_option="freq")
                parts.append(query.boost_query(part, weight))
        return parts

    def _hit(self, address: Any, score: float) -> SearchHit:
        document = self._documents[self._searcher.doc(address).get_first("number")]
        return SearchHit(
            title=document.title, text=document.text, url=document.url, source=document.id, score=float(score)
        )


def _indexed(text: str) -> str:
    # A lone surrogate is no text, and Tantivy would refuse it.
    return index_text(text).encode("utf-8", "replace").decode()


def _analyzer(tantivy: Any) -> Any:
    filters = tantivy.Filter
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    return builder.filter(filters.lowercase()).filter(filters.ascii_fold()).build()


def _import() -> Any:
    try:
        import tantivy
    except ImportError as missing:
        raise MissingDependencyError(
            "TantivySearch needs 'tantivy'; install it with: pip install 'langgraph-metis[tantivy]'. "
            "CorpusSearch needs nothing."
        ) from missing
    return tantivy
