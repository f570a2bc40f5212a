"""An event loop in a thread of its own, so that sync and async callers share one async client."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from metis_agent.errors import SandboxGoneError

__all__ = ["LoopThread"]

R = TypeVar("R")


class LoopThread:
    """Started at the first use. The thread is a daemon: it keeps no interpreter from ending."""

    def __init__(self) -> None:
        # Garbage collection under the lock may end a session, whose finalizer comes here again.
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._owner = os.getpid()

    @property
    def usable(self) -> bool:
        """False once closed, and in a fork of the process: neither the thread nor the client survives it."""
        return not self._closed and self._owner == os.getpid()

    def submit(self, work: Coroutine[Any, Any, R]) -> Future[R]:
        """Run a coroutine on the loop; cancelling the future cancels it.

        Raises:
            SandboxGoneError: the loop is closed, or belongs to the process that this one was forked from.
        """
        with self._lock:
            if self.usable:
                return asyncio.run_coroutine_threadsafe(work, self._running())
        work.close()
        cause = "is closed" if self._closed else "was made before this process was forked"
        raise SandboxGoneError(f"this E2B sandbox {cause}; make another one.")

    def close(self) -> None:
        """Stop the loop and cancel what runs on it; may be called twice."""
        with self._lock:
            mine, self._closed = self.usable, True
            loop, thread = self._loop, self._thread
        if mine and loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            if thread is not threading.current_thread():
                thread.join()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="metis-e2b", daemon=True)
            self._thread.start()
        return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
