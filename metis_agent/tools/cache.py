"""Results kept for a while, so that the same call is made once.

Stands under `CachedSearch` and `InstrumentedTool`. Callers that ask for the same key at the same time share one
call: in training, the G rollouts of one question often begin with the same search.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from metis_agent.errors import ConfigurationError

__all__ = ["ResultCache"]

V = TypeVar("V")


class ResultCache(Generic[V]):
    """A bounded cache for threads and event loops alike; the least recently used entry goes first.

    A call that raises is not kept, but those who waited for it get the same exception: they would only have
    made the same call. Where it was cancelled, one of them makes it.

    Args:
        max_entries: how many results are kept.
        seconds: how long each is good for; `None` for ever.
        clock: seconds that never go back.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(
        self, max_entries: int = 1_000, *, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not max_entries >= 1:
            raise ConfigurationError(f"ResultCache(max_entries={max_entries!r}): it must be at least 1.")
        if seconds is not None and not seconds > 0:
            raise ConfigurationError(f"ResultCache(seconds={seconds!r}): it must be more than 0, or None for ever.")
        self._max_entries = max_entries
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Future[V], float]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V], keep: Callable[[V], bool] | None = None) -> tuple[V, bool]:
        """Return the kept result, or make it.

        Args:
            key: what the result depends on, all of it.
            make: makes the result.
            keep: whether a result may be kept; by default all are.

        Returns:
            The result, and whether it was there already (or under way).
        """
        while True:
            future, mine = self._claim(key)
            if mine:
                return self._settle(key, future, self._made(key, future, make), keep), False
            try:
                return future.result(), True
            except _AbandonedError:
                continue

    async def aget(
        self, key: Hashable, make: Callable[[], Awaitable[V]], keep: Callable[[V], bool] | None = None
    ) -> tuple[V, bool]:
        """As `get`."""
        while True:
            future, mine = self._claim(key)
            if mine:
                try:
                    value = await make()
                except BaseException as error:
                    self._fail(key, future, error)
                    raise
                return self._settle(key, future, value, keep), False
            try:
                return await asyncio.wrap_future(future), True
            except _AbandonedError:
                continue

    def clear(self) -> None:
        """Forget all results."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _claim(self, key: Hashable) -> tuple[Future[V], bool]:
        """Return what will be the result, and whether the caller is the one to make it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._clock() < entry[1]:
                self._entries.move_to_end(key)
                return entry[0], False
            future: Future[V] = Future()
            future.set_running_or_notify_cancel()  # a waiter that is cancelled can't cancel it for the others
            self._put(key, future, float("inf"))
            return future, True

    def _made(self, key: Hashable, future: Future[V], make: Callable[[], V]) -> V:
        try:
            return make()
        except BaseException as error:
            self._fail(key, future, error)
            raise

    def _settle(self, key: Hashable, future: Future[V], value: V, keep: Callable[[V], bool] | None) -> V:
        if keep is None or keep(value):
            with self._lock:
                self._put(key, future, float("inf") if self._seconds is None else self._clock() + self._seconds)
        else:
            self._drop(key, future)
        future.set_result(value)
        return value

    def _fail(self, key: Hashable, future: Future[V], error: BaseException) -> None:
        self._drop(key, future)
        future.set_exception(error if isinstance(error, Exception) else _AbandonedError())

    def _put(self, key: Hashable, future: Future[V], until: float) -> None:
        self._entries[key] = (future, until)
        self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def _drop(self, key: Hashable, future: Future[Any]) -> None:
        with self._lock:
            if key in self._entries and self._entries[key][0] is future:
                del self._entries[key]


class _AbandonedError(Exception):
    """The call that others waited for was cancelled."""
