"""Any LangChain retriever as a search backend.

So a vector store or a hosted index that an application has already is what the text search tool looks in.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever

from metis_agent.tools.search.base import SearchHit

__all__ = ["RetrieverSearch"]


class RetrieverSearch:
    """Asks a retriever; of a document's metadata, `title`, `url`, `source` and `score` are used."""

    def __init__(self, retriever: BaseRetriever) -> None:
        self._retriever = retriever

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return the retriever's first `limit` documents, in its order."""
        return _hits(self._retriever.invoke(query), limit)

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`."""
        return _hits(await self._retriever.ainvoke(query), limit)


def _hits(documents: Sequence[LangChainDocument], limit: int) -> list[SearchHit]:
    return [_hit(document) for document in documents[:limit]]


def _hit(document: LangChainDocument) -> SearchHit:
    metadata = document.metadata
    score = metadata.get("score", 0.0)
    return SearchHit(
        text=document.page_content,
        title=str(metadata.get("title") or ""),
        url=str(metadata.get("url") or ""),
        source=str(metadata.get("source") or document.id or ""),
        score=float(score) if isinstance(score, int | float) else 0.0,
    )
