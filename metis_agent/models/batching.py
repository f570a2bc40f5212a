"""Micro-batching: many callers wait, one worker runs their requests together.

Hundreds of graph runs call the model at once, each for one completion; a model is only fast on batches. A
batch starts when it is full, or when arrivals have paused for a moment; while one runs, the next gathers. Where
batches are continuous, who waits joins the running batch, and who is done need not wait for the others.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Generic, TypeVar

from metis_agent.errors import ConfigurationError

__all__ = ["MicroBatcher"]

RequestT = TypeVar("RequestT")
ResultT = TypeVar("ResultT")

_LONGEST_LINGER = 0.025
_LINGER_SHARE = 0.05
_IDLE_SECONDS = 5.0
_QUIET_ROUNDS = 16
"""Rounds of an event loop without a new request after which its tasks are taken to have asked what they have to ask:
about as many as a graph takes from one node to the next."""
_CLOSE_SECONDS = 10.0
_JOINING = 4
"""Who waits joins a running batch once they are one to so many: each time costs a run of their prompts and a copy of
the cache, which a few must not ask of many."""

Run = Callable[[Sequence[RequestT], Callable[[int], Sequence[RequestT]]], Iterator[Mapping[int, ResultT]]]


class MicroBatcher(Generic[RequestT, ResultT]):
    """Runs requests from any thread or event loop in batches, on one worker thread.

    The worker starts with the first request and ends after a few idle seconds, so an unused model holds no
    thread. At interpreter exit waiting requests are cancelled and the running batch is given a few seconds.

    Args:
        run: Runs requests together and yields results as they come, by the requests' places. From time to time it may
            ask its second argument, with the number of requests that still run, for more: their places come after.
            Called on the worker thread only; see `metis_agent.models.engine.Engine.run`.
        max_batch: The most requests that run at once.
        linger: Seconds without a new request after which a batch starts though it is not full. It grows to
            5% of the last batch's run time (25 ms at most): waiting for stragglers pays when a batch is long.
        continuous: Whether requests join a running batch, and are answered while others run. If not, a batch runs
            whole and answers all at its end, which keeps waves of callers together.
    """

    def __init__(
        self, run: Run[RequestT, ResultT], *, max_batch: int, linger: float = 0.002, continuous: bool = False
    ) -> None:
        if max_batch < 1 or linger < 0:
            raise ConfigurationError(
                f"max_batch={max_batch!r}, linger={linger!r}: a batch holds at least 1 request and waits "
                "0 or more seconds. Pass max_batch >= 1 and linger >= 0."
            )
        self._run = run
        self._max_batch = max_batch
        self._linger = linger
        self._continuous = continuous
        self._changed = threading.Condition()
        self._waiting: deque[tuple[RequestT, Future[ResultT]]] = deque()
        self._last_arrival = 0.0
        self._last_run_seconds = 0.0
        self._worker: threading.Thread | None = None
        self._gathered: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, list[tuple[RequestT, Future[ResultT]]]] = (
            weakref.WeakKeyDictionary()
        )
        self._to_wake: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        self.closed = False

    def submit(self, request: RequestT) -> Future[ResultT]:
        """Queue a request. Cancel the future to withdraw it; a running one finishes and is dropped."""
        future: Future[ResultT] = Future()
        self._queue([(request, future)])
        return future

    def _queue(self, asked: Sequence[tuple[RequestT, Future[ResultT]]]) -> None:
        with self._changed:
            if self.closed:
                raise RuntimeError("The model is closed: the interpreter is shutting down. Ask before exit.")
            before = len(self._waiting)
            self._waiting.extend(asked)
            self._last_arrival = time.monotonic()
            if self._worker is None:
                self._start()
            elif before == 0 or before < self._max_batch <= len(self._waiting):
                # In between the worker wakes by its own clock, which costs callers nothing.
                self._changed.notify()

    async def ask(self, request: RequestT) -> ResultT:
        """Queue a request and await its result; cancelling the task withdraws it.

        All results that come together wake their event loop in one go. One by one, the first caller would be back
        with its next request while the others still wait to be woken, and would get a batch of its own. For the
        same reason the requests of a loop's tasks are gathered until the others have had their turn: on a busy
        machine the first would else run alone while a hundred tasks are about to ask.
        """
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        future: Future[ResultT] = Future()
        self._gather(loop, (request, future))
        future.add_done_callback(lambda _: self._wake(loop, woken))
        try:
            await woken
        except asyncio.CancelledError:
            future.cancel()
            raise
        return future.result()

    def _gather(self, loop: asyncio.AbstractEventLoop, asked: tuple[RequestT, Future[ResultT]]) -> None:
        if self.closed:
            self._queue([asked])  # which says so
        gathered = self._gathered.get(loop)
        if gathered is not None:
            gathered.append(asked)
            return
        gathered = self._gathered[loop] = [asked]
        loop.call_soon(self._hand_over, loop, gathered, 1, _QUIET_ROUNDS)

    def _hand_over(
        self, loop: asyncio.AbstractEventLoop, gathered: list[tuple[RequestT, Future[ResultT]]], seen: int, rounds: int
    ) -> None:
        """Queue what a loop's tasks have asked, once they are done asking."""
        if rounds > 0 and len(gathered) < self._max_batch:
            left = rounds - 1 if len(gathered) == seen else _QUIET_ROUNDS
            loop.call_soon(self._hand_over, loop, gathered, len(gathered), left)
            return
        self._gathered.pop(loop, None)
        try:
            self._queue(gathered)
        except RuntimeError:  # closed meanwhile
            for _, future in gathered:
                future.cancel()

    def close(self) -> None:
        """Cancel what waits and let the running batch end (ten seconds at most)."""
        with self._changed:
            self.closed = True
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._changed.notify()
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join(timeout=_CLOSE_SECONDS)

    def _start(self) -> None:
        self._worker = threading.Thread(target=self._work, name="metis-micro-batcher", daemon=True)
        _close_at_exit(self)
        self._worker.start()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                began = time.monotonic()
                self._run_batch(batch)
                self._last_run_seconds = time.monotonic() - began
            # Idle, the worker must not keep the last results alive.
            del batch

    def _wake(self, loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
        if threading.current_thread() is self._worker:
            self._to_wake.setdefault(loop, []).append(woken)
        else:
            _wake_all(loop, [woken])

    def _run_batch(self, batch: Sequence[tuple[RequestT, Future[ResultT]]]) -> None:
        running = {place: future for place, (_, future) in enumerate(batch)}
        places = count(len(batch))

        def joining(still: int) -> list[RequestT]:
            joined = self._joining(still)
            running.update({next(places): future for _, future in joined})
            return [request for request, _ in joined]

        results: dict[int, ResultT] = {}
        try:
            for more in self._run([request for request, _ in batch], joining):
                results |= more
                if self._continuous or len(results) == len(running):
                    self._settle({running.pop(place): result for place, result in results.items()})
                    results = {}
            if running:
                raise ValueError(f"{len(running)} requests of a batch got no result.")
        except BaseException as error:  # every waiting caller must hear of it, whatever it is
            for future in running.values():
                future.set_exception(error)
            self._wake_up()

    def _settle(self, results: Mapping[Future[ResultT], ResultT]) -> None:
        for future, result in results.items():
            future.set_result(result)
        self._wake_up()

    def _wake_up(self) -> None:
        for loop, woken in self._to_wake.items():
            _wake_all(loop, woken)
        self._to_wake.clear()

    def _joining(self, running: int) -> list[tuple[RequestT, Future[ResultT]]]:
        """Those who wait and join so many."""
        if not self._continuous:
            return []
        with self._changed:
            room = min(len(self._waiting), self._max_batch - running)
            return self._take(room) if room * _JOINING >= running else []

    def _take(self, most: int) -> list[tuple[RequestT, Future[ResultT]]]:
        """So many of those who wait, without those who no longer do."""
        taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        return [(request, future) for request, future in taken if future.set_running_or_notify_cancel()]

    def _next_batch(self) -> list[tuple[RequestT, Future[ResultT]]] | None:
        """Wait for a batch; `None` when the worker should end."""
        with self._changed:
            if not self._waiting and not self.closed:
                self._changed.wait(timeout=_IDLE_SECONDS)
            if self.closed or not self._waiting:
                self._worker = None
                return None
            pause = max(self._linger, min(_LONGEST_LINGER, _LINGER_SHARE * self._last_run_seconds))
            while len(self._waiting) < self._max_batch and not self.closed:
                remaining = self._last_arrival + pause - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(timeout=remaining)
            return self._take(self._max_batch)


def _wake_all(loop: asyncio.AbstractEventLoop, woken: Sequence[asyncio.Future[None]]) -> None:
    def wake() -> None:
        for future in woken:
            if not future.done():
                future.set_result(None)

    # A loop that has closed meanwhile has nobody left to wake.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(wake)


_open: weakref.WeakSet[MicroBatcher[object, object]] = weakref.WeakSet()


def _close_at_exit(batcher: MicroBatcher[RequestT, ResultT]) -> None:
    # One hook for all: an atexit entry for each model would keep every model alive.
    if not _open:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open.add(batcher)  # type: ignore[arg-type]


def _close_all() -> None:
    for batcher in list(_open):
        batcher.close()
