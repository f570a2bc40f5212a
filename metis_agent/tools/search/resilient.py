"""Wrappers that keep a search that depends on others from hurting the agent: each adds one virtue.

Any backend with `search(query, limit)` can be wrapped, of texts or of images, and so can a wrapper. The order
that makes sense, from the outside: cache, breaker, deadline, retries, backend. See `web_search`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from tenacity import AsyncRetrying, Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay

from metis_agent.deadline import DeadlineError, arun_in_thread, arun_within, run_within
from metis_agent.errors import ConfigurationError
from metis_agent.tools.proxy import ResultCache
from metis_agent.tools.search.base import SearchUnavailableError

__all__ = ["BreakerSearch", "CachedSearch", "DeadlineSearch", "RetryingSearch", "Searcher"]

S = TypeVar("S")


class Searcher(Protocol[S]):
    """What can be wrapped: a `SearchBackend` of any kind of hit; with `asearch`, it is awaited."""

    def search(self, query: str, limit: int) -> list[S]:
        """Return at most `limit` hits."""


class DeadlineSearch(Generic[S]):
    """Answers within its time or not at all: a search that hangs is left behind in a daemon thread.

    Args:
        backend: where to search.
        seconds: how long a search may take.

    Raises:
        ConfigurationError: `seconds` is not more than 0.
    """

    def __init__(self, backend: Searcher[S], *, seconds: float) -> None:
        _check(seconds > 0, f"DeadlineSearch(seconds={seconds!r}): it must be more than 0.")
        self._backend = backend
        self._seconds = seconds

    def search(self, query: str, limit: int) -> list[S]:
        """As the backend's.

        Raises:
            SearchUnavailableError: the time was up.
        """
        try:
            return run_within(self._seconds, self._backend.search, query, limit)
        except DeadlineError:
            raise self._too_late() from None

    async def asearch(self, query: str, limit: int) -> list[S]:
        """As `search`."""
        try:
            return await arun_within(self._seconds, _asearch(self._backend, query, limit))
        except DeadlineError:
            raise self._too_late() from None

    def _too_late(self) -> SearchUnavailableError:
        return SearchUnavailableError(
            f"The search gave no answer within {self._seconds:g} seconds. Answer without it, or try once more later."
        )


class RetryingSearch(Generic[S]):
    """Tries again, after a short and random wait, what failed for a reason that may pass by itself.

    Args:
        backend: where to search.
        retries: further tries after the first.
        seconds: none begins later than this after the first began.
        wait: the longest wait before the first retry, in seconds; it doubles for the next.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(self, backend: Searcher[S], *, retries: int = 2, seconds: float = 10.0, wait: float = 0.5) -> None:
        _check(retries >= 0, f"RetryingSearch(retries={retries!r}): it must be 0 or more.")
        _check(seconds > 0, f"RetryingSearch(seconds={seconds!r}): it must be more than 0.")
        _check(wait >= 0, f"RetryingSearch(wait={wait!r}): it must be seconds, 0 or more.")
        self._backend = backend
        self._policy: dict[str, Any] = {
            "retry": retry_if_exception_type(SearchUnavailableError),
            "stop": stop_after_attempt(retries + 1) | stop_before_delay(seconds),
            "wait": lambda state: random.uniform(0.5, 1.0) * wait * 2 ** (state.attempt_number - 1),
            "reraise": True,
        }

    def search(self, query: str, limit: int) -> list[S]:
        """As the backend's; what it raises in the end is what it raised last."""
        return Retrying(**self._policy)(self._backend.search, query, limit)

    async def asearch(self, query: str, limit: int) -> list[S]:
        """As `search`."""
        return await AsyncRetrying(**self._policy)(_asearch, self._backend, query, limit)


class BreakerSearch(Generic[S]):
    """After some failures in a row, refuses at once for a while; then lets one search try.

    A service that is down is not hammered, and an agent does not spend its time on waiting for it.

    Args:
        backend: where to search.
        failures: how many in a row (of `SearchUnavailableError`) open the circuit.
        pause: seconds that it stays open.
        clock: seconds that never go back.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(
        self,
        backend: Searcher[S],
        *,
        failures: int = 4,
        pause: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(failures >= 1, f"BreakerSearch(failures={failures!r}): it must be at least 1.")
        _check(pause > 0, f"BreakerSearch(pause={pause!r}): it must be more than 0 seconds.")
        self._backend = backend
        self._limit = failures
        self._pause = pause
        self._clock = clock
        self._lock = threading.Lock()
        self._failed = 0
        self._open_until = 0.0

    def search(self, query: str, limit: int) -> list[S]:
        """As the backend's.

        Raises:
            SearchUnavailableError: the circuit is open.
        """
        with self._circuit():
            return self._backend.search(query, limit)

    async def asearch(self, query: str, limit: int) -> list[S]:
        """As `search`."""
        with self._circuit():
            return await _asearch(self._backend, query, limit)

    @contextmanager
    def _circuit(self) -> Iterator[None]:
        self._enter()
        try:
            yield
        except SearchUnavailableError:
            with self._lock:
                self._failed += 1
                if self._failed >= self._limit:
                    self._open_until = self._clock() + self._pause
            raise
        except Exception:
            # The service did answer, only not with what was hoped for.
            self._close()
            raise
        else:
            self._close()

    def _enter(self) -> None:
        with self._lock:
            if self._failed < self._limit:
                return
            left = self._open_until - self._clock()
            if left > 0:
                raise SearchUnavailableError(
                    f"The search failed {self._failed} times in a row and is paused for {left:.0f} seconds. "
                    "Answer without it."
                )
            # This one may try; the others wait for what it finds, or for the next pause to end.
            self._open_until = self._clock() + self._pause

    def _close(self) -> None:
        with self._lock:
            self._failed = 0


class CachedSearch(Generic[S]):
    """Keeps answers for a while; equal searches at the same time are one.

    Args:
        backend: where to search; all its settings are fixed, so query and limit are all that an answer depends on.
        seconds: how long an answer is good for.
        max_entries: how many answers are kept.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(self, backend: Searcher[S], *, seconds: float = 900.0, max_entries: int = 1_000) -> None:
        self._backend = backend
        self._cache: ResultCache[tuple[S, ...]] = ResultCache(max_entries, seconds=seconds)

    def search(self, query: str, limit: int) -> list[S]:
        """As the backend's."""
        hits, _ = self._cache.get((query, limit), lambda: tuple(self._backend.search(query, limit)))
        return list(hits)

    async def asearch(self, query: str, limit: int) -> list[S]:
        """As `search`."""

        async def make() -> tuple[S, ...]:
            return tuple(await _asearch(self._backend, query, limit))

        hits, _ = await self._cache.aget((query, limit), make)
        return list(hits)


async def _asearch(backend: Searcher[S], query: str, limit: int) -> list[S]:
    """Await a backend that can be awaited; run any other in a thread that nobody has to wait for."""
    search: Callable[[str, int], Awaitable[list[S]]] | None = getattr(backend, "asearch", None)
    if search is not None:
        return await search(query, limit)
    return await arun_in_thread(backend.search, query, limit)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigurationError(message)
