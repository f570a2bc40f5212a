"""A session in a remote sandbox of its own: one call at a time, each within its own deadline.

The SDK's deadline is not relied on: it fires late, and the call after it hangs. Here the time is kept outside,
the request is cancelled, and the remote sandbox, in which the code may go on, is killed; the next call makes
a new one.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from metis_agent.deadline import DeadlineError, arun_within
from metis_agent.errors import ConfigurationError, InputError, SandboxGoneError
from metis_agent.tools.sandboxes.base import NO_IMAGES, Execution
from metis_agent.tools.sandboxes.closing import Closing
from metis_agent.tools.sandboxes.e2b.call import Call
from metis_agent.tools.sandboxes.inside.serve import MAX_CODE_BYTES
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.pictures import InputImage

if TYPE_CHECKING:
    from metis_agent.tools.sandboxes.e2b.service import Service

__all__ = ["E2BSession"]

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
        from metis_agent.tools.sandboxes.e2b import attempt, client

        call = Call(self._limits)
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
        except (client.SandboxDiedError, attempt.ProcessEndedError):
            reason = _DIED
        except BaseException:
            # The code may still run: it must not meet the next call.
            self._service.discard(self._slot)
            raise
        self._service.discard(self._slot)
        return call.execution("killed", reason)

    async def _attempt(self, code: str, seconds: float, images: Mapping[str, InputImage], call: Call) -> None:
        from metis_agent.tools.sandboxes.e2b.attempt import Attempt

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
