"""What a search backend is: a query goes in, hits come out, best first.

Stands between `TextSearchTool`, which shows hits to a model, and whatever finds them: the embedded
`CorpusSearch`, a LangChain retriever (`RetrieverSearch`), or a class of your own with this one method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from metis_agent.errors import ToolError

__all__ = ["AsyncSearchBackend", "SearchBackend", "SearchHit", "SearchUnavailableError"]


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
