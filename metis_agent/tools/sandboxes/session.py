"""A session on this machine: one process at a time, replaced after a timeout or a death."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError, SandboxGoneError
from metis_agent.tools.sandboxes.base import (
    NO_IMAGES,
    Closing,
    Execution,
    ExecutionStatus,
    InputImage,
    SandboxLimits,
    encode_pixels,
    load_or_say,
)
from metis_agent.tools.sandboxes.inside.wire import MAX_CODE_BYTES, FrameError
from metis_agent.tools.sandboxes.process import CallTimeoutError, Reply, SessionProcess
from metis_agent.tools.sandboxes.watch import LimitExceededError

__all__ = ["LocalSession"]

_LOADING_SHARE = 0.75
"""Of a call's time, for loading the images that it needs; the code has the rest at least."""
_ENCODING_SHARE = 0.1
"""On top of a call's time, for encoding what it showed."""
_MOST_NOTES = 20

_DIED = "The process ended during the call: it ran out of memory, crashed in native code, or was made to exit."


class LocalSession(Closing):
    """See `SandboxSession`. Calls from several threads run one after another.

    Args:
        start: starts a fresh process.
        limits: of this session.
    """

    def __init__(self, *, start: Callable[[], SessionProcess], limits: SandboxLimits) -> None:
        self._start, self._limits = start, limits
        self._turn = threading.Lock()
        """Held during a call."""
        self._hold = threading.Lock()
        """Held while `_process` changes, so that `close` never signals a released one."""
        self._closed = False
        self._process: SessionProcess | None = start()
        self._placed: dict[str, InputImage] = {}
        """What was sent to the process."""

    def run(self, code: str, timeout: float | None = None, images: Mapping[str, InputImage] = NO_IMAGES) -> Execution:
        """See `SandboxSession.run`."""
        seconds = self._limits.seconds if timeout is None else timeout
        if not seconds > 0:
            raise ConfigurationError(f"timeout={timeout!r}: it must be a number of seconds above 0.")
        source = code.encode("utf-8", "replace")
        if len(source) > MAX_CODE_BYTES:
            raise InputError(
                f"the code is {len(source)} bytes long; at most {MAX_CODE_BYTES} can be run. Write less data "
                "into the code."
            )
        with self._turn:
            process = self._running_process()
            return self._call(process, source, seconds, images)

    def close(self) -> None:
        """See `SandboxSession.close`."""
        self._closed = True
        with self._hold:
            if self._process is not None:
                self._process.kill()
        with self._turn:
            self._discard()

    def _running_process(self) -> SessionProcess:
        if self._closed:
            raise SandboxGoneError("this session is closed; open another one with Sandbox.open().")
        if self._process is None:
            process = self._start()
            with self._hold:
                self._process = process
        return self._process

    def _place(
        self, process: SessionProcess, images: Mapping[str, InputImage], until: float, deadline: float
    ) -> list[str]:
        """Give the process what it does not have yet, one after another; and say why some of it can't be had.

        Loading ends at `until`, so that some time is left for the code before the call's `deadline`.
        """
        missing: list[str] = []
        late: list[str] = []
        for name, image in images.items():
            if self._placed.get(name) == image:
                continue
            left = until - time.monotonic()
            if left <= 0:
                late.append(name)
                continue
            found, why = load_or_say(name, image, left)
            if found is None:
                missing.append(why)
            else:
                process.place(name, found, deadline)
                self._placed[name] = image
        if late:
            missing.append(f"Not there: {', '.join(late)}. Loading the others took most of the time that a call has.")
        return missing

    def _call(
        self, process: SessionProcess, source: bytes, seconds: float, images: Mapping[str, InputImage]
    ) -> Execution:
        began = time.monotonic()
        deadline = began + seconds
        try:
            missing = self._place(process, images, began + seconds * _LOADING_SHARE, deadline)
            reply = process.call(source, deadline)
        except CallTimeoutError:
            return self._ended(process, "timeout", f"Stopped after {seconds:g} s.", began)
        except LimitExceededError as error:
            return self._ended(process, "killed", str(error), began)
        except FrameError as error:
            return self._ended(process, "killed", f"The process broke the protocol ({error}).", began)
        except EOFError:
            if self._closed or not process.backend_alive():
                self._discard()
                cause = "it was closed" if self._closed else "the sandbox was closed, or died"
                message = f"the session ended under a call: {cause}. What it had computed is lost."
                raise SandboxGoneError(message) from None
            return self._ended(process, "killed", _DIED, began)
        except BaseException:
            # An interrupt in this thread: the answer may still come, and must not meet the next call.
            self._discard()
            raise
        return self._execution(process, reply, missing, began, deadline + seconds * _ENCODING_SHARE)

    def _execution(
        self, process: SessionProcess, reply: Reply, missing: list[str], began: float, until: float
    ) -> Execution:
        stdout, stderr, dropped = process.printed()
        notes = [*missing, *reply.notes.splitlines()[:_MOST_NOTES]]
        shown = []
        for number, picture in enumerate(reply.pictures):
            if time.monotonic() > until:
                notes.append(f"{len(reply.pictures) - number} more not shown: the call's time was up.")
                break
            try:
                shown.append(encode_pixels(*picture))
            except MissingDependencyError as error:
                notes.append(f"An image can't be shown: {error}")
        return Execution(
            status="ok" if reply.finished else "error",
            stdout=stdout,
            stderr=stderr,
            traceback=reply.error,
            result=reply.result,
            images=tuple(shown),
            notes=tuple(notes),
            seconds=time.monotonic() - began,
            truncated=dropped or reply.truncated,
        )

    def _ended(self, process: SessionProcess, status: ExecutionStatus, reason: str, began: float) -> Execution:
        process.kill()
        seconds = time.monotonic() - began
        stdout, stderr, dropped = process.printed()
        self._discard()
        return Execution(status=status, stdout=stdout, stderr=stderr, reason=reason, seconds=seconds, truncated=dropped)

    def _discard(self) -> None:
        with self._hold:
            process, self._process = self._process, None
            self._placed = {}
        if process is not None:
            process.release()
