"""The local corpus in Tantivy: an alternative to `CorpusSearch` where searches come by the thousand.

An order of magnitude faster to ask than SQLite, for 17 MB to install (the `tantivy` extra). Text is prepared by
the same `terms`, so the same words find the same documents; ranking is BM25, the title weighing more.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.tools.search.base import SearchHit
from metis_agent.tools.search.documents import Document, index_text, query_terms, read_documents

__all__ = ["TantivySearch"]

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
