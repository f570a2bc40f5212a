"""Makes, extends and kills remote sandboxes. Runs on the loop; killing is done in the background.

A remote sandbox also ends by itself, `lifetime` seconds after its last extension: were this process killed,
E2B cleans up.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from e2b import SandboxNotFoundException, SandboxNotRunningException

from metis_agent.deadline import DeadlineError, arun_within
from metis_agent.errors import SandboxGoneError
from metis_agent.tools.sandboxes.e2b.client import NotRunningError, RemoteSandbox, UnreachableError, translated
from metis_agent.tools.sandboxes.e2b.loop import LoopThread

__all__ = ["Remote", "Service", "Settings", "Slot"]

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
