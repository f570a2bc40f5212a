"""Running a tool for so long and no longer.

A sync tool that hangs can't be stopped, only left behind. So it runs in a daemon thread, which keeps neither
the run nor the interpreter from ending, as the thread of an executor would. Callbacks, configuration and
interrupts reach it because the thread runs in a copy of the caller's context. A tool or gate of which many calls were
left behind, and go on, is not called until one of them ends.
"""

from __future__ import annotations

import asyncio
import dis
import inspect
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

__all__ = [
    "DeadlineError",
    "arun_in_thread",
    "arun_within",
    "is_async_only",
    "is_sync_only",
    "run_async",
    "run_within",
    "start_in_thread",
]

R = TypeVar("R")
_Task = tuple[Callable[[], Any], Future[Any]]

_within: ContextVar[tuple[asyncio.Timeout | None, object]] = ContextVar("metis_within", default=(None, None))
"""The limit that a call in a thread is under, and of what it is a call."""
_KEPT_THREADS = 32
_MOST_LEFT = 64


class DeadlineError(Exception):
    """The time was up; not a `TimeoutError`, which a tool may raise by itself."""


class NotCalledError(DeadlineError):
    """Too many earlier calls were left behind and go on, so this one was not made; the text says how many."""


def run_within(seconds: float, call: Callable[..., R], *arguments: Any, of: object = None) -> R:
    """The call's result or exception, if it comes in time.

    Args:
        seconds: that it may take.
        call: what runs.
        *arguments: of it.
        of: the tool or gate that is called, where its calls that are left behind count.

    Raises:
        DeadlineError: it did not; the call is left to itself.
        NotCalledError: too many calls of the same were.
    """
    _threads.check(of)
    future = _threads.submit(call, *arguments)
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        if future.done():
            return future.result()
        _threads.leave(of, future)
        raise DeadlineError from None


async def arun_within(seconds: float, work: Awaitable[R], *, of: object = None) -> R:
    """The same for async work, which is cancelled when its time is up.

    Raises:
        DeadlineError: it took longer.
        NotCalledError: it was to call in a thread, and too many calls of the same were left behind.
    """
    scope = asyncio.timeout(seconds)
    token = _within.set((scope, of))
    try:
        async with scope:
            return await work
    except TimeoutError:
        if scope.expired():
            raise DeadlineError from None
        raise
    finally:
        _within.reset(token)


async def arun_in_thread(call: Callable[..., R], *arguments: Any) -> R:
    """Await a sync call in a thread that nobody has to wait for, were it cancelled.

    Raises:
        NotCalledError: within `arun_within`, too many calls of the same were left behind.
    """
    scope, of = _within.get()
    _threads.check(of)
    future = _threads.submit(_contained, call, *arguments)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        # A run that somebody broke off says nothing of the tool.
        if scope is not None and scope.expired():
            _threads.leave(of, future)
        raise


def run_async(work: Callable[..., Coroutine[Any, Any, R]], *arguments: Any) -> R:
    """Run async work to its end from sync code, also where this thread already runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work(*arguments))
    return _threads.submit(lambda: asyncio.run(work(*arguments))).result()


def is_async_only(tool: BaseTool) -> bool:
    """True where there is no sync code, as in every tool of an MCP server, or where it does nothing but raise.

    Told before the call: a `NotImplementedError` from code that has begun its work is no reason to do it again.
    """
    from langchain_core.tools import BaseTool, StructuredTool, Tool  # sandboxes do without

    if isinstance(tool, StructuredTool | Tool):
        return tool.func is None and tool.coroutine is not None
    if type(tool)._arun is BaseTool._arun:
        return False
    sync = inspect.unwrap(type(tool)._run)
    return inspect.isfunction(sync) and not any(step.opname.startswith("RETURN") for step in dis.get_instructions(sync))


def is_sync_only(tool: BaseTool) -> bool:
    """True where `ainvoke` would only run the sync code in a thread of the event loop's pool."""
    from langchain_core.tools import BaseTool, StructuredTool, Tool

    if isinstance(tool, StructuredTool | Tool):
        return tool.coroutine is None
    return type(tool)._arun is BaseTool._arun and type(tool).ainvoke is BaseTool.ainvoke


def start_in_thread(call: Callable[..., R], *arguments: Any) -> Future[R]:
    """Start a sync call in a thread that nobody has to wait for."""
    return _threads.submit(call, *arguments)


class _DaemonThreads:
    """Threads that are used again: starting one anew costs more than a short tool does."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """Threads do not survive a fork."""
        self._idle: list[SimpleQueue[_Task]] = []
        self._lock = threading.Lock()
        self._left: Counter[int] = Counter()
        """Calls that were left behind and go on, by the id of what they are calls of, which they keep alive."""

    def check(self, of: object) -> None:
        """Refuse a call where too many are left behind.

        Raises:
            NotCalledError: they are.
        """
        if (left := self._left[id(of)]) >= _MOST_LEFT:
            raise NotCalledError(f"{left} earlier calls took too long and go on, so it was not called")

    def leave(self, of: object, future: Future[Any]) -> None:
        """Count a call that took too long, until it ends."""
        if of is None:
            return
        self._count(id(of), 1)
        future.add_done_callback(lambda _: self._count(id(of), -1))

    def _count(self, key: int, change: int) -> None:
        with self._lock:
            self._left[key] += change
            if self._left[key] <= 0:
                del self._left[key]

    def submit(self, call: Callable[..., R], *arguments: Any) -> Future[R]:
        future: Future[R] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it under the thread
        context = copy_context()
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            threading.Thread(target=self._work, args=(inbox,), name="metis-tool", daemon=True).start()
        inbox.put((lambda: context.run(call, *arguments), future))
        return future

    def _work(self, inbox: SimpleQueue[_Task]) -> None:
        keep = True
        while keep:
            call, future = inbox.get()
            settle: Callable[[Any], None]
            try:
                settle, value = future.set_result, call()
            except BaseException as error:
                settle, value = future.set_exception, error
            # Idle before the caller goes on: then its next call finds this thread.
            keep = len(self._idle) < _KEPT_THREADS
            if keep:
                self._idle.append(inbox)
            settle(value)
            del call, future, settle, value  # an idle thread keeps nothing alive


def _contained(call: Callable[..., R], *arguments: Any) -> R:
    try:
        return call(*arguments)
    except StopIteration as error:  # which no future of a loop takes: whoever awaits would wait for ever
        raise RuntimeError(f"the call raised {error!r}") from error


_threads = _DaemonThreads()
