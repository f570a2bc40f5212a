"""Remote sandboxes of E2B, one for each session; one call at a time, each within its own deadline.

The SDK's deadline is not relied on: it fires late, and the call after it hangs. Here the time is kept outside,
the request is cancelled, and the remote sandbox, in which the code may go on, is killed; the next call makes
a new one.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from metis_agent.deadline import DeadlineError, arun_within
from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError, SandboxGoneError
from metis_agent.tools.sandboxes.base import NO_IMAGES, Closing, Execution, InputImage, SandboxLimits
from metis_agent.tools.sandboxes.inside.wire import MAX_CODE_BYTES

if TYPE_CHECKING:
    from metis_agent.tools.sandboxes.e2b.client import Call
    from metis_agent.tools.sandboxes.e2b.service import Service

__all__ = ["KEY_VARIABLE", "E2BSandbox", "E2BSession"]

KEY_VARIABLE = "E2B_API_KEY"
_LONGEST = 86_400
_SPARE_SECONDS = 60.0


class E2BSandbox(Closing):
    """See `Sandbox`. Each session has a remote sandbox of its own, a virtual machine at E2B.

    Where it is reached is up to the SDK's environment variables (`E2B_DOMAIN`, proxies). Sessions are killed when
    they are closed or forgotten, when this is closed, and when the process ends; if it ends without a chance to
    do so, E2B kills them after `lifetime`.

    Args:
        limits: of a session that asks for no others; memory, processes and disk are up to the template.
        api_key: by default the environment's `E2B_API_KEY`. It never enters a remote sandbox.
        template: what remote sandboxes are made of; by default E2B's `code-interpreter-v1`.
        internet: whether code in it may reach the internet, as in no local sandbox.
        lifetime: seconds that a remote sandbox lives without a call; up to what your plan at E2B allows.
        open_seconds: for making a remote sandbox.

    Raises:
        MissingDependencyError: the SDK is not installed.
        ConfigurationError: there is no key, or a value is out of its range.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        api_key: str | None = None,
        template: str | None = None,
        internet: bool = False,
        lifetime: float = 900.0,
        open_seconds: float = 15.0,
    ) -> None:
        key = api_key or os.environ.get(KEY_VARIABLE)
        if not key:
            raise ConfigurationError(f"{KEY_VARIABLE} is not set. Get a key at https://e2b.dev/dashboard and set it.")
        _check_seconds("lifetime", lifetime)
        _check_seconds("open_seconds", open_seconds)
        try:
            from metis_agent.tools.sandboxes.e2b.service import Service, Settings
        except ImportError as missing:
            raise MissingDependencyError(
                f"E2B's SDK is not installed ({missing}). Install it with: pip install 'langgraph-metis[e2b]'"
            ) from missing
        self._limits = limits or SandboxLimits()
        self._lifetime = lifetime
        self._service = Service(
            Settings(api_key=key, template=template, internet=internet, lifetime=lifetime, open_seconds=open_seconds)
        )
        self._sessions: weakref.WeakSet[E2BSession] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        # Also at the end of the process.
        self._finalizer = weakref.finalize(self, self._service.shut_down)

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return "E2B"

    @property
    def limits(self) -> SandboxLimits:
        """See `Sandbox.limits`."""
        return self._limits

    @property
    def internet(self) -> bool:
        """Whether code in it may reach the internet."""
        return self._service.settings.internet

    def open(self, limits: SandboxLimits | None = None) -> E2BSession:
        """See `Sandbox.open`.

        Raises:
            SandboxUnavailableError: E2B refuses the key.
            SandboxGoneError: E2B can't be reached, failed, or was too slow; or this is closed.
        """
        session = self._new_session(limits)
        finished(self._service.loop.submit(session.start()))
        return session

    async def aopen(self, limits: SandboxLimits | None = None) -> E2BSession:
        """As `open`, for async code; what a cancelled one makes is killed."""
        session = self._new_session(limits)
        await asyncio.wrap_future(self._service.loop.submit(session.start()))
        return session

    def close(self) -> None:
        """See `Sandbox.close`. Waits up to 5 s for E2B to confirm."""
        with self._lock:
            self._closed = True
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._finalizer()

    def _new_session(self, limits: SandboxLimits | None) -> E2BSession:
        chosen = limits or self._limits
        if chosen.seconds + _SPARE_SECONDS > self._lifetime:
            raise ConfigurationError(
                f"E2BSandbox(lifetime={self._lifetime!r}): calls may take {chosen.seconds:g} s; give it at least "
                f"{_SPARE_SECONDS:g} s more than that."
            )
        with self._lock:
            if self._closed:
                raise SandboxGoneError("this sandbox is closed; make another one.")
            session = E2BSession(service=self._service, owner=self, limits=chosen)
            self._sessions.add(session)
        return session


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value <= _LONGEST):  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"E2BSandbox({name}={value!r}): it must be a number of seconds above 0 and up to {_LONGEST} (a day)."
        )


R = TypeVar("R")

_DIED = "The process ended during the call: it ran out of memory, crashed in native code, or was made to exit."
_ENDED = "The sandbox had ended before this call, so the code did not run."
_FLOOD = "It sent more than {most} MB of output. Print less, and show fewer or smaller images."
_CLOSED = "this session is closed; open another one with Sandbox.open()."
_CLOSED_UNDER = "the session ended under a call: it was closed. What it had computed is lost."


class E2BSession(Closing):
    """See `SandboxSession`; `arun` does the same for async code, and may be cancelled.

    Args:
        service: makes its remote sandbox.
        owner: kept alive as long as the session: what ends the service when nobody uses it any more.
        limits: `seconds`, `output_bytes`, `images` and `image_pixels` hold; memory, processes and disk are those
            of the remote sandbox's template.
    """

    def __init__(self, *, service: Service, owner: object, limits: SandboxLimits) -> None:
        from metis_agent.tools.sandboxes.e2b.service import Slot

        self._service, self._owner, self._limits = service, owner, limits
        self._lock = asyncio.Lock()
        """Held during a call; of the loop."""
        self._slot = Slot()
        self._closed = False
        self._running: object = None
        """The call whose turn it is, and its task."""
        self._task: asyncio.Task[Any] | None = None
        # Also at garbage collection: nobody is left to close it then.
        weakref.finalize(self, service.discard, self._slot)

    def run(self, code: str, timeout: float | None = None, images: Mapping[str, InputImage] = NO_IMAGES) -> Execution:
        """See `SandboxSession.run`. The time that making a new remote sandbox takes is part of the call's.

        Raises:
            InputError: the code can't be sent (too long).
            SandboxGoneError: E2B failed, did not answer, or the session is closed.
            SandboxUnavailableError: E2B refuses the key.
        """
        return finished(self._submit(code, timeout, images))

    async def arun(
        self, code: str, timeout: float | None = None, images: Mapping[str, InputImage] = NO_IMAGES
    ) -> Execution:
        """As `run`, for async code. Cancelling it ends the code; what the session had computed is lost."""
        return await asyncio.wrap_future(self._submit(code, timeout, images))

    def close(self) -> None:
        """See `SandboxSession.close`. The remote sandbox is killed in the background."""
        self._closed = True
        if self._service.loop.usable:
            self._service.loop.submit(self._end())
        self._service.discard(self._slot)

    async def start(self) -> None:
        """Make the remote sandbox now, rather than at the first call; on the loop."""
        self._slot.remote = await self._service.make()
        if self._closed:
            self._service.discard(self._slot)
            raise SandboxGoneError(_CLOSED)

    def _submit(self, code: str, timeout: float | None, images: Mapping[str, InputImage]) -> Future[Execution]:
        seconds = self._limits.seconds if timeout is None else timeout
        if not seconds > 0:
            raise ConfigurationError(f"timeout={timeout!r}: it must be a number of seconds above 0.")
        size = len(code.encode("utf-8", "replace"))
        if size > MAX_CODE_BYTES:
            raise InputError(
                f"the code is {size} bytes long; at most {MAX_CODE_BYTES} can be run. Write less data into the code."
            )
        if self._closed:
            raise SandboxGoneError(_CLOSED)
        # JSON carries no half of a surrogate pair.
        clean = code.encode("utf-8", "replace").decode()
        turn = object()
        future = self._service.loop.submit(self._take_turn(turn, clean, seconds, images))
        future.add_done_callback(lambda done: self._abandon(turn) if done.cancelled() else None)
        return future

    def _abandon(self, turn: object) -> None:
        """Nobody waits for a call any more. Python 3.11 can lose the cancelling itself, in `asyncio.wait_for`."""
        if self._running is turn:
            self._service.discard(self._slot)

    async def _take_turn(self, turn: object, code: str, seconds: float, images: Mapping[str, InputImage]) -> Execution:
        async with self._lock:
            if self._closed:
                raise SandboxGoneError(_CLOSED)
            self._running, self._task = turn, asyncio.current_task()
            try:
                execution = await self._call(code, seconds, images)
            except asyncio.CancelledError:
                if self._closed:
                    raise SandboxGoneError(_CLOSED_UNDER) from None
                raise
            finally:
                self._running = self._task = None
                if self._closed:
                    self._service.discard(self._slot)
            if self._closed and execution.status == "killed":
                raise SandboxGoneError(_CLOSED_UNDER)
            return execution

    async def _call(self, code: str, seconds: float, images: Mapping[str, InputImage]) -> Execution:
        """Run within the time, and sort what became of it."""
        from metis_agent.tools.sandboxes.e2b import client, service

        call = client.Call(self._limits)
        try:
            await arun_within(seconds, self._attempt(code, seconds, images, call))
            return call.execution()
        except DeadlineError:
            return self._late(call, seconds)
        except client.UnreachableError as error:
            # Nothing was sent: the remote sandbox is as it was, and may be reached again.
            raise SandboxGoneError(f"E2B can't be reached, so the code did not run ({error}).") from error
        except client.NotRunningError:
            reason = _ENDED
        except client.FloodError:
            reason = _FLOOD.format(most=client.MOST_BYTES >> 20)
        except client.BrokenAnswerError as error:
            reason = f"The process broke the protocol ({error})."
        except (client.SandboxDiedError, service.ProcessEndedError):
            reason = _DIED
        except BaseException:
            # The code may still run: it must not meet the next call.
            self._service.discard(self._slot)
            raise
        self._service.discard(self._slot)
        return call.execution("killed", reason)

    async def _attempt(self, code: str, seconds: float, images: Mapping[str, InputImage], call: Call) -> None:
        from metis_agent.tools.sandboxes.e2b.service import Attempt

        if self._slot.remote is None:
            self._slot.remote = await self._service.make()
        remote = self._slot.remote
        await Attempt(service=self._service, remote=remote, call=call, limits=self._limits).run(code, seconds, images)

    def _late(self, call: Call, seconds: float) -> Execution:
        if call.loading:
            call.fail(f"{call.loading} did not load within {seconds:g} s, so the code did not run.")
            return call.execution()
        if call.exchange.finished and not call.kernel_ended:
            call.notes.append("What the code showed is left out: there was no time left to read it.")
            return call.execution()
        self._service.discard(self._slot)
        if call.exchange.status is None:
            raise SandboxGoneError(f"E2B did not answer within {seconds:g} s; whether the code ran is not known.")
        return call.execution("timeout", f"Stopped after {seconds:g} s.")

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()


def finished(future: Future[R]) -> R:
    """The result of work on the loop; an interrupt of this thread cancels the work."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
