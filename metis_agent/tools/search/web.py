"""Search of the web, as an agent should have it: never late, never hammering, never asked twice.

    cache -> breaker -> deadline -> retries -> ddgs

Give the result to `TextSearchTool(backend=web_search())` or to `ImageSearchTool(words=web_image_search())`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from metis_agent.errors import ConfigurationError
from metis_agent.tools.search.base import AsyncSearchBackend
from metis_agent.tools.search.ddgs import DdgsImageSearch, DdgsSearch
from metis_agent.tools.search.images import ImageHit
from metis_agent.tools.search.resilient import BreakerSearch, CachedSearch, DeadlineSearch, RetryingSearch, Searcher

__all__ = ["resilient", "web_image_search", "web_search"]

H = TypeVar("H")


def web_search(
    *, seconds: float = 8.0, retries: int = 2, cache_seconds: float = 900.0, **settings: Any
) -> AsyncSearchBackend:
    """Pages of the web.

    Args:
        seconds: how long a search may take, retries included.
        retries: further tries where the service did not answer.
        cache_seconds: how long an answer is good for.
        **settings: as `DdgsSearch` takes them, such as `region="fr-fr"`.

    Raises:
        MissingDependencyError: the `search` extra is not installed.
        ConfigurationError: a setting is out of its range.
    """
    backend = DdgsSearch(**_timed(seconds, settings))
    return resilient(backend, seconds=seconds, retries=retries, cache_seconds=cache_seconds)


def web_image_search(
    *, seconds: float = 8.0, retries: int = 2, cache_seconds: float = 900.0, **settings: Any
) -> CachedSearch[ImageHit]:
    """Images of the web; arguments and errors as for `web_search`."""
    backend = DdgsImageSearch(**_timed(seconds, settings))
    return resilient(backend, seconds=seconds, retries=retries, cache_seconds=cache_seconds)


def resilient(
    backend: Searcher[H], *, seconds: float = 8.0, retries: int = 2, cache_seconds: float = 900.0
) -> CachedSearch[H]:
    """Any backend within all four wrappers.

    Raises:
        ConfigurationError: a value is out of its range.
    """
    tried = RetryingSearch(backend, retries=retries, seconds=seconds)
    return CachedSearch(BreakerSearch(DeadlineSearch(tried, seconds=seconds)), seconds=cache_seconds)


def _timed(seconds: float, settings: dict[str, Any]) -> dict[str, Any]:
    """One request gets about half of the time, so that a second one is possible."""
    if not seconds > 0:
        raise ConfigurationError(f"seconds={seconds!r}: it must be more than 0.")
    return {"timeout": max(1, int(seconds / 2)), **settings}
