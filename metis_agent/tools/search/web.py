"""Search of the web, as an agent should have it: never late, never hammering, never asked twice.

    cache -> breaker -> deadline -> retries -> ddgs

Give the result to `TextSearchTool(backend=web_search())` or to `ImageSearchTool(words=web_image_search())`.

Beneath stands `ddgs`, the maintained successor of duckduckgo-search; no key needed. Its backends ask once, clean what
comes back, and say what went wrong in words. One engine is fixed, since `ddgs` multiplies its timeout by the engines
that it tries, and `extract()`, which fetches any address, is not exposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from metis_agent.errors import ConfigurationError, MissingDependencyError, ToolError
from metis_agent.tools.search.base import (
    AsyncSearchBackend,
    ImageHit,
    SearchHit,
    SearchRefusedError,
    SearchUnavailableError,
    cut,
    plain_text,
    web_link,
)
from metis_agent.tools.search.resilient import BreakerSearch, CachedSearch, DeadlineSearch, RetryingSearch, Searcher

__all__ = ["DdgsClient", "DdgsImageSearch", "DdgsSearch", "resilient", "web_image_search", "web_search"]

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


_MAX_QUERY = 500
_MAX_TITLE = 300
_MAX_TEXT = 2_000
_MAX_RESULTS = 50

Safety = Literal["on", "moderate", "off"]
Age = Literal["d", "w", "m", "y"]


class DdgsClient(Protocol):
    """The part of `ddgs.DDGS` that is used."""

    def text(self, query: str, **settings: Any) -> list[dict[str, Any]]:
        """Pages, as dicts with `title`, `href` and `body`."""

    def images(self, query: str, **settings: Any) -> list[dict[str, Any]]:
        """Images, as dicts with `title`, `image`, `thumbnail`, `url`, `width`, `height` and `source`."""


class _Ddgs:
    """What text and image search have in common.

    Args:
        engine: which of the engines of `ddgs` to ask, and no other.
        region: country and language, such as `uk-en`; `wt-wt` for none.
        safesearch: how strict the engine is.
        timelimit: only results of the last day, week, month or year; `None` for all.
        timeout: seconds that one request may take.
        proxy: the address of an HTTP or SOCKS5 proxy.
        client: makes the client of one search; by default a `ddgs.DDGS` with this timeout and proxy.

    Raises:
        MissingDependencyError: `ddgs` is not installed.
        ConfigurationError: a setting is one that `ddgs` does not know.
    """

    _category: Literal["text", "images"]

    def __init__(
        self,
        *,
        engine: str = "duckduckgo",
        region: str = "us-en",
        safesearch: Safety = "moderate",
        timelimit: Age | None = None,
        timeout: int = 4,
        proxy: str | None = None,
        client: Callable[[], DdgsClient] | None = None,
    ) -> None:
        _check_settings(safesearch, timelimit, timeout)
        self._client = client or _default_client(self._category, engine, timeout, proxy)
        self._settings = {"backend": engine, "region": region, "safesearch": safesearch, "timelimit": timelimit}

    def _ask(self, query: str, limit: int) -> list[Mapping[str, Any]]:
        """Return at most `limit` raw results.

        Raises:
            SearchUnavailableError: no answer came, or none that can be read.
            ToolError: nothing was found.
        """
        words = cut(query, _MAX_QUERY)
        if not words or limit < 1:
            return []
        wanted = min(limit, _MAX_RESULTS)
        try:
            # A client each time: its engines keep state, and searches run in many threads.
            found = getattr(self._client(), self._category)(words, max_results=wanted, **self._settings)
        except Exception as error:
            raise _in_words(error, words) from error
        results = found if isinstance(found, Sequence) else []
        return [result for result in results if isinstance(result, Mapping)][:wanted]


class DdgsSearch(_Ddgs):
    """Pages of the web for a query."""

    _category = "text"

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return at most `limit` pages, in the engine's order.

        Raises:
            SearchUnavailableError: no answer came, or none that can be read.
            ToolError: nothing was found.
        """
        return [hit for result in self._ask(query, limit) if (hit := _page(result)) is not None]


class DdgsImageSearch(_Ddgs):
    """Images of the web for a query."""

    _category = "images"

    def search(self, query: str, limit: int) -> list[ImageHit]:
        """Return at most `limit` images, in the engine's order.

        Raises:
            SearchUnavailableError: no answer came, or none that can be read.
            ToolError: nothing was found.
        """
        return [hit for result in self._ask(query, limit) if (hit := _image(result)) is not None]


def _page(result: Mapping[str, Any]) -> SearchHit | None:
    url = web_link(result.get("href"))
    title, text = plain_text(result.get("title"), _MAX_TITLE), plain_text(result.get("body"), _MAX_TEXT)
    return SearchHit(title=title, text=text, url=url, source=url) if url and (title or text) else None


def _image(result: Mapping[str, Any]) -> ImageHit | None:
    image = web_link(result.get("image"))
    if not image:
        return None
    return ImageHit(
        title=plain_text(result.get("title"), _MAX_TITLE),
        text="",
        url=web_link(result.get("url")),
        source=plain_text(result.get("source"), 100),
        image=image,
        thumbnail=web_link(result.get("thumbnail")),
        width=_pixels(result.get("width")),
        height=_pixels(result.get("height")),
    )


def _pixels(value: object) -> int:
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0


def _in_words(error: Exception, query: str) -> ToolError:
    """What a model reads. `ddgs` raises anything that the answer of a server can lead to."""
    if "No results found" in str(error):
        # For ddgs, a service that refuses and a query that nothing matches are the same.
        return SearchRefusedError(
            f"No results for {cut(query, 200)!r}: nothing matches, or the search service is refusing requests for "
            "now. Try other words once, or answer without it."
        )
    late = isinstance(error, TimeoutError) or "time" in type(error).__name__.lower() or "timed out" in str(error)
    reason = "did not answer in time" if late else "could not be reached, or gave an answer that can't be read"
    return SearchUnavailableError(f"The search service {reason}. Answer without it, or try once more later.")


def _check_settings(safesearch: str, timelimit: str | None, timeout: float) -> None:
    if safesearch not in ("on", "moderate", "off"):
        raise ConfigurationError(f"safesearch={safesearch!r}: it must be 'on', 'moderate' or 'off'.")
    if timelimit not in (None, "d", "w", "m", "y"):
        raise ConfigurationError(f"timelimit={timelimit!r}: it must be 'd', 'w', 'm', 'y' or None.")
    if not timeout >= 1:
        raise ConfigurationError(f"timeout={timeout!r}: it must be whole seconds, at least 1.")


def _default_client(category: str, engine: str, timeout: int, proxy: str | None) -> Callable[[], DdgsClient]:
    try:
        from ddgs import DDGS
        from ddgs.engines import ENGINES
    except ImportError as missing:
        raise MissingDependencyError(
            f"web search needs {missing.name!r}; install it with: pip install 'langgraph-metis[search]'"
        ) from missing
    if engine not in ENGINES[category]:  # ddgs would ask all of them instead
        raise ConfigurationError(f"engine={engine!r}: for {category} it must be one of {sorted(ENGINES[category])}.")
    return lambda: DDGS(proxy=proxy, timeout=timeout)
