"""Where text and image search look.

- `base`: what a backend is, and what it finds, made fit to be shown; any LangChain retriever is one
- `corpus`: the embedded full-text engine, over `documents`; and a faster one, as an extra
- `web`: the web within `resilient`'s deadline, retries, breaker and cache
- `image_folder`: a folder of images, by words or by `likeness`
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names
from metis_agent.tools.search.base import (
    AsyncSearchBackend,
    ImageEmbedder,
    ImageHit,
    ImageSearchBackend,
    RetrieverSearch,
    SearchBackend,
    SearchHit,
    SearchUnavailableError,
    SimilarImageBackend,
)
from metis_agent.tools.search.corpus import CorpusSearch
from metis_agent.tools.search.documents import Document, read_documents
from metis_agent.tools.search.resilient import BreakerSearch, CachedSearch, DeadlineSearch, RetryingSearch
from metis_agent.tools.search.web import resilient, web_image_search, web_search

if TYPE_CHECKING:
    from metis_agent.tools.search.image_folder import ImageFolder

__all__ = [
    "AsyncSearchBackend",
    "BreakerSearch",
    "CachedSearch",
    "CorpusSearch",
    "DeadlineSearch",
    "Document",
    "ImageEmbedder",
    "ImageFolder",
    "ImageHit",
    "ImageSearchBackend",
    "RetrieverSearch",
    "RetryingSearch",
    "SearchBackend",
    "SearchHit",
    "SearchUnavailableError",
    "SimilarImageBackend",
    "read_documents",
    "resilient",
    "web_image_search",
    "web_search",
]

__getattr__ = lazy_names(__name__, {"ImageFolder": "image_folder"}, "images")
