"""What a search backend is: a query goes in, hits come out, best first; of texts, and of images.

Stands between `TextSearchTool`, which shows hits to a model, and whatever finds them: the embedded
`CorpusSearch`, a LangChain retriever (`RetrieverSearch`), or a class of your own with this one method. Likewise between
`ImageSearchTool` and `DdgsImageSearch` (the web, by words) or `ImageFolder` (files here, by words and by likeness).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever

from metis_agent.errors import ToolError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AsyncSearchBackend",
    "ImageEmbedder",
    "ImageHit",
    "ImageSearchBackend",
    "RetrieverSearch",
    "SearchBackend",
    "SearchHit",
    "SearchUnavailableError",
    "SimilarImageBackend",
]


class SearchUnavailableError(ToolError):
    """The search gave no answer, for a reason that may pass by itself: another try is worth it."""


@dataclass(frozen=True, kw_only=True)
class SearchHit:
    """One thing found."""

    text: str
    title: str = ""
    url: str = ""
    """Where it can be read, or empty."""
    source: str = ""
    """Which document of which collection it is, in the backend's own words."""
    score: float = 0.0
    """Higher is better; only comparable within one answer."""


@runtime_checkable
class SearchBackend(Protocol):
    """Finds documents for a query; called from many threads at once."""

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return at most `limit` hits, best first; an empty list where nothing fits.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


@runtime_checkable
class AsyncSearchBackend(SearchBackend, Protocol):
    """A backend that can also wait without a thread; one that can't is run in a thread."""

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`."""


@dataclass(frozen=True, kw_only=True)
class ImageHit(SearchHit):
    """One image found; `text` is what is known of it, and `url` the page that it stands on."""

    image: str
    """Its http(s) address, or the name of a file within its collection."""
    thumbnail: str = ""
    """An http(s) address or a data URI of a small version, or empty."""
    width: int = 0
    """In pixels; 0 where unknown, as for `height`."""
    height: int = 0


@runtime_checkable
class ImageSearchBackend(Protocol):
    """Finds images for words; called from many threads at once."""

    def search(self, query: str, limit: int) -> list[ImageHit]:
        """Return at most `limit` hits, best first; an empty list where nothing fits.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


@runtime_checkable
class SimilarImageBackend(Protocol):
    """Finds images like an image; called from many threads at once."""

    def similar(self, image: Image, limit: int) -> list[ImageHit]:
        """Return at most `limit` hits, most alike first; an empty list where none is.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


class ImageEmbedder(Protocol):
    """A model that puts images and words into one space, such as CLIP or SigLIP."""

    name: str
    """Which model and version; embeddings that another one made are not compared."""

    def embed_images(self, images: Sequence[Image]) -> list[list[float]]:
        """Return a vector of fixed length for each image."""

    def embed_text(self, text: str) -> list[float]:
        """Return the vector of a text, of the same length."""


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
