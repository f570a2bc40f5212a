"""Where text search looks: the backend protocol, the embedded corpus, any LangChain retriever."""

from metis_agent.tools.search.base import AsyncSearchBackend, SearchBackend, SearchHit
from metis_agent.tools.search.corpus import CorpusSearch
from metis_agent.tools.search.documents import Document, read_documents
from metis_agent.tools.search.retriever import RetrieverSearch

__all__ = [
    "AsyncSearchBackend",
    "CorpusSearch",
    "Document",
    "RetrieverSearch",
    "SearchBackend",
    "SearchHit",
    "read_documents",
]
