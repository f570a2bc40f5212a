"""Makes, extends and kills remote sandboxes. Runs on the loop; killing is done in the background.

A remote sandbox also ends by itself, `lifetime` seconds after its last extension: were this process killed,
E2B cleans up. `LoopThread` is the event loop, on which sync and async callers share one async client; `Attempt` is one
try at a call: images in, the code, images out, and once more where the remote sandbox was paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from e2b import SandboxNotFoundException, SandboxNotRunningException

from metis_agent.deadline import DeadlineError, arun_in_thread, arun_within
from metis_agent.errors import SandboxGoneError
from metis_agent.tools.sandboxes.base import InputImage, SandboxLimits
from metis_agent.tools.sandboxes.e2b.client import (
    Call,
    NotRunningError,
    RemoteSandbox,
    UnreachableError,
    binding,
    image_file,
    shown_images,
    translated,
)

__all__ = ["Attempt", "LoopThread", "ProcessEndedError", "Remote", "Service", "Settings", "Slot"]

_EXTEND_EVERY = 60.0
_KILL_SECONDS = 10.0
_LEAVE_SECONDS = 5.0
_SPARE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How remote sandboxes are made."""

    api_key: str = field(repr=False)
    template: str | None
    internet: bool
    lifetime: float
    open_seconds: float


@dataclass
class Remote:
    """A remote sandbox, and what this side knows of it."""

    sandbox: RemoteSandbox
    extended: float
    """When its end was last put off, by the monotonic clock."""
    images: dict[str, object] = field(default_factory=dict)
    """Images that it has, by name."""


@dataclass
class Slot:
    """Where a session keeps its remote sandbox, so that it can be killed when the session is forgotten."""

    remote: Remote | None = None

    def take(self) -> Remote | None:
        """Empty it."""
        remote, self.remote = self.remote, None
        return remote


class Service:
    """See the module's docstring."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = LoopThread()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def make(self) -> Remote:
        """Return a fresh remote sandbox.

        Raises:
            SandboxUnavailableError: the key is refused.
            SandboxGoneError: the service failed, or did not answer.
        """
        creating = self._start(self._create())
        try:
            # Shielded: one that comes after its deadline must still be killed.
            return await arun_within(self.settings.open_seconds, asyncio.shield(creating))
        except DeadlineError:
            creating.add_done_callback(self._kill_late)
            seconds = self.settings.open_seconds
            raise SandboxGoneError(f"E2B made no sandbox within {seconds:g} s; is the network slow?") from None
        except asyncio.CancelledError:
            creating.add_done_callback(self._kill_late)
            raise
        except Exception as error:
            raise translated(error) from error

    async def extend(self, remote: Remote) -> None:
        """Put off its end where that was not done lately.

        Raises:
            NotRunningError: it has ended, or is paused.
            UnreachableError: the service is not there, or fails; the sandbox may still be.
        """
        if time.monotonic() - remote.extended < _EXTEND_EVERY:
            return
        try:
            await remote.sandbox.set_timeout(self._lifetime)
        except (SandboxNotFoundException, SandboxNotRunningException) as error:
            raise NotRunningError(str(error)) from error
        except Exception as error:
            raise UnreachableError(str(translated(error))) from error
        remote.extended = time.monotonic()

    async def resume(self, remote: Remote) -> None:
        """Connect again to one that was paused, or that lost its way.

        Raises:
            NotRunningError: it has ended.
            UnreachableError: the service is not there, or fails.
        """
        try:
            await remote.sandbox.connect(timeout=self._lifetime)
        except (SandboxNotFoundException, SandboxNotRunningException) as error:
            raise NotRunningError(str(error)) from error
        except Exception as error:
            raise UnreachableError(str(translated(error))) from error
        remote.extended = time.monotonic()

    def discard(self, slot: Slot) -> None:
        """Kill what a slot holds, without waiting for it; from any thread, and for garbage collection."""
        remote = slot.take()
        if remote is not None and self.loop.usable:
            with contextlib.suppress(SandboxGoneError):
                self.loop.submit(self._kill_in_background(remote))

    def shut_down(self) -> None:
        """Wait a little for what is still being killed, and stop the loop; may be called twice."""
        if self.loop.usable:
            with contextlib.suppress(SandboxGoneError, TimeoutError):
                self.loop.submit(self._settle()).result(_LEAVE_SECONDS + 1.0)
            self.loop.close()

    @property
    def _lifetime(self) -> int:
        return math.ceil(self.settings.lifetime)

    async def _create(self) -> Remote:
        settings = self.settings
        began = time.monotonic()
        sandbox = await RemoteSandbox.create(
            template=settings.template,
            timeout=self._lifetime,
            allow_internet_access=settings.internet,
            api_key=settings.api_key,
            # In debug mode the SDK gives every caller the same sandbox.
            debug=False,
            # Longer than anyone waits: one that is made must become known, or it can't be killed.
            request_timeout=settings.open_seconds + _SPARE_SECONDS,
        )
        return Remote(sandbox, began)

    def _kill_late(self, creating: asyncio.Task[Remote]) -> None:
        if not creating.cancelled() and creating.exception() is None:
            self._start(self._kill(creating.result()))

    async def _kill_in_background(self, remote: Remote) -> None:
        self._start(self._kill(remote))

    async def _kill(self, remote: Remote) -> None:
        # Where it fails, the lifetime ends it.
        with contextlib.suppress(Exception):
            await arun_within(_KILL_SECONDS, remote.sandbox.kill(request_timeout=_KILL_SECONDS))

    async def _settle(self) -> None:
        me = asyncio.current_task()
        deadline = time.monotonic() + _LEAVE_SECONDS
        # One that is being made is killed once it is there: two rounds at most.
        while (left := self._tasks - {me}) and (seconds := deadline - time.monotonic()) > 0:
            await asyncio.wait(left, timeout=seconds)

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


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


class ProcessEndedError(Exception):
    """The process that runs the code ended, and its server said so."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """See the module's docstring. Keeps no time; whoever does cancels it."""

    service: Service
    remote: Remote
    call: Call
    """Takes what comes back."""
    limits: SandboxLimits

    async def run(self, code: str, seconds: float, images: Mapping[str, InputImage]) -> None:
        """Run code.

        Raises:
            ProcessEndedError: see there.
            Exception: what `RemoteSandbox.execute` and `Service` raise.
        """
        await self._awake(lambda: self.service.extend(self.remote))
        new = {name: image for name, image in images.items() if self.remote.images.get(name) != image}
        paths: dict[str, str] = {}
        for name, image in new.items():  # one at a time: together they may be large
            content = await self._load(name, image)
            if content is not None:
                paths[name] = await self._awake(partial(self.remote.sandbox.upload, f".metis/{name}.png", content))
        placed = await self._awake(lambda: self._send(code, seconds, paths))
        _check(self.call)
        if placed:
            self.remote.images.update({name: new[name] for name in paths})
        if self.call.encoded:
            self.call.images, notes = await arun_in_thread(shown_images, self.call.encoded, self.limits)
            self.call.notes += notes

    async def _awake(self, work: Callable[[], Awaitable[R]]) -> R:
        try:
            return await work()
        except NotRunningError:
            # Paused, perhaps. It was not done, so it may be tried again.
            await self.service.resume(self.remote)
            return await work()

    async def _load(self, name: str, image: InputImage) -> bytes | None:
        self.call.loading = name
        content, note = await arun_in_thread(image_file, name, image)
        self.call.loading = ""
        if content is None:
            self.call.notes.append(note)
        return content

    async def _send(self, code: str, seconds: float, paths: Mapping[str, str]) -> bool:
        """Bind the images, then run the code; gives whether the images are there."""
        problem = ""
        if paths:
            placing = Call(self.limits)
            lines = [binding(name, path) for name, path in paths.items()]
            await self.remote.sandbox.execute("\n".join(lines), placing, seconds)
            _check(placing)
            problem = placing.execution().traceback
            if problem:
                self.call.notes.append(f"{', '.join(paths)}: not there. {problem.splitlines()[-1]}")
        await self.remote.sandbox.execute(code, self.call, seconds)
        return not problem


def _check(call: Call) -> None:
    if call.kernel_ended:
        raise ProcessEndedError
