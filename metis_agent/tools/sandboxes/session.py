"""A session on this machine: one process at a time, replaced after a timeout or a death.

A pool holds open sessions by key: the least recently used and the idle ones are closed.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError, SandboxGoneError
from metis_agent.tools.sandboxes.base import (
    NO_IMAGES,
    Closing,
    Execution,
    ExecutionStatus,
    InputImage,
    SandboxLimits,
    SandboxSession,
    encode_pixels,
    load_or_say,
)
from metis_agent.tools.sandboxes.inside.wire import MAX_CODE_BYTES, FrameError
from metis_agent.tools.sandboxes.machine import LimitExceededError
from metis_agent.tools.sandboxes.process import CallTimeoutError, Reply, SessionProcess

__all__ = ["LocalSession", "SessionPool"]

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


@dataclass(eq=False)
class _Entry:
    idle_seconds: float
    session: SandboxSession | None = None
    opening: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    last_used: float = 0.0

    def close(self) -> None:
        with self.opening:
            if self.session is not None:
                self.session.close()


class SessionPool:
    """Thread-safe. Sessions in use are never evicted, so there can be more than `most` for a while.

    Args:
        open_session: opens a fresh one.
        most: how many to keep.
    """

    def __init__(self, open_session: Callable[[], SandboxSession], *, most: int) -> None:
        self._open, self._most = open_session, most
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._timer: threading.Timer | None = None
        self._timer_ends = 0.0
        self._finalizer = weakref.finalize(self, _close_all, self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def session(self, key: Hashable, *, idle_seconds: float) -> Iterator[SandboxSession]:
        """The session of this key, opened if there is none; kept for `idle_seconds` after its last use."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry(idle_seconds))
            self._entries.move_to_end(key)
            entry.users += 1
        try:
            yield self._opened(key, entry)
        finally:
            with self._lock:
                entry.users -= 1
                entry.last_used = time.monotonic()
            self._close_stale()

    def discard(self, key: Hashable) -> None:
        """Close the session of this key, also under a running call; its state is lost."""
        with self._lock:
            entry = self._entries.pop(key, None)
        if entry is not None:
            entry.close()

    def close(self) -> None:
        """Close every session. The pool can be used again."""
        with self._lock:
            keys = list(self._entries)
            self._cancel_timer()
        for key in keys:
            self.discard(key)

    def _opened(self, key: Hashable, entry: _Entry) -> SandboxSession:
        # Two calls of one key must get one session; calls of other keys must not wait for it.
        with entry.opening:
            if entry.session is None:
                try:
                    entry.session = self._open()
                except BaseException:
                    with self._lock:
                        if self._entries.get(key) is entry:
                            del self._entries[key]
                    raise
            return entry.session

    def _close_stale(self) -> None:
        """Close what is idle for too long or too many, and set a timer for what will be."""
        now = time.monotonic()
        with self._lock:
            idle = [(key, entry) for key, entry in self._entries.items() if not entry.users]
            surplus = len(self._entries) - self._most
            stale = [
                key
                for place, (key, entry) in enumerate(idle)
                if place < surplus or now - entry.last_used >= entry.idle_seconds
            ]
            closing = [self._entries.pop(key) for key in stale]
            self._set_timer(now)
        for entry in closing:
            entry.close()

    def _set_timer(self, now: float) -> None:
        ends = [entry.last_used + entry.idle_seconds for entry in self._entries.values() if not entry.users]
        if not ends or (self._timer is not None and now < self._timer_ends <= min(ends)):
            # None is needed, or the one that is set comes first and will set the next.
            return
        self._cancel_timer()
        self._timer_ends = min(ends)
        # The timer must not keep the pool alive.
        self._timer = threading.Timer(self._timer_ends - now, _expire, [weakref.ref(self)])
        self._timer.daemon = True
        self._timer.start()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _expire(reference: weakref.ref[SessionPool]) -> None:
    pool = reference()
    if pool is not None:
        pool._close_stale()


def _close_all(entries: OrderedDict[Hashable, _Entry]) -> None:
    while entries:
        entries.popitem()[1].close()
