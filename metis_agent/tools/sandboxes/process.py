"""The host's hold on one session's process: send a call, wait, and end it whatever it does.

Between calls the process is stopped (SIGSTOP), so threads that a call left behind use no time and send
nothing. What it sends is capped and checked; see `inside.wire`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from metis_agent.tools.sandboxes.inside import screen, wire

__all__ = ["CallTimeoutError", "Handle", "LimitExceededError", "PidfdHandle", "PopenHandle", "Reply", "SessionProcess"]

_TICK_SECONDS = 0.05
_GONE_SECONDS = 5.0
_FRAME_OVERHEAD = 1024


class CallTimeoutError(Exception):
    """The call did not answer in its time."""


class LimitExceededError(Exception):
    """The session went over a limit that the host watches; the message says which."""


class Handle(Protocol):
    """A process that can be signalled without mistaking it for another one of the same number."""

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens where the process is gone."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it came in time."""
        ...

    def close(self) -> None:
        """Free the handle."""
        ...


class PidfdHandle:
    """A process held by a Linux pidfd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send_signal(self, number: int) -> None:
        """See `Handle`."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def wait(self, seconds: float) -> bool:
        """See `Handle`."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        """See `Handle`."""
        os.close(self.fd)


class PopenHandle:
    """A child process that leads its own process group; signals go to the whole group."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send_signal(self, number: int) -> None:
        """See `Handle`."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def wait(self, seconds: float) -> bool:
        """See `Handle`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """See `Handle`."""
        if self._process.stdin is not None:
            self._process.stdin.close()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A session's answer, checked for form only."""

    finished: bool
    error: str
    result: str | None
    truncated: bool


class SessionProcess:
    """One process and the host's ends of its stream and screen.

    Args:
        stream: the connected stream.
        screen_fd: the shared memory of what it prints.
        capacity: bytes kept of each text.
        handle: to signal it.
        watch: called now and then during a call and after it; raises `LimitExceededError`.
        backend_alive: whether what started it still runs; if not, its end was not its own doing.
        clean_up: called once, after the process ended.
    """

    def __init__(
        self,
        *,
        stream: socket.socket,
        screen_fd: int,
        capacity: int,
        handle: Handle,
        watch: Callable[[], None],
        backend_alive: Callable[[], bool],
        clean_up: Callable[[], None],
    ) -> None:
        self._stream, self._screen_fd, self._capacity = stream, screen_fd, capacity
        self._handle, self._watch = handle, watch
        self.backend_alive = backend_alive
        self._calls = 0
        self._paused = False
        # Also at garbage collection and at exit: nobody is left to close it then.
        self._free = weakref.finalize(self, _free, stream, screen_fd, handle, clean_up)

    def call(self, code: bytes, seconds: float) -> Reply:
        """Run code in the process.

        Raises:
            CallTimeoutError: no answer in `seconds`.
            EOFError: the process hung up.
            wire.FrameError: it sent something that is not an answer.
            LimitExceededError: it used too much of something.
        """
        deadline = time.monotonic() + seconds
        self._calls += 1
        if self._paused:
            self._handle.send_signal(signal.SIGCONT)
        try:
            self._stream.settimeout(seconds)
            self._stream.sendall(wire.pack_frame(self._calls, wire.pack_parts({b"c": code})))
            number, payload = wire.read_frame(
                lambda count: self._receive(count, deadline), 2 * self._capacity + _FRAME_OVERHEAD
            )
        except TimeoutError:
            raise CallTimeoutError from None
        except OSError as error:
            raise EOFError(str(error)) from error
        self._handle.send_signal(signal.SIGSTOP)
        self._paused = True
        if number != self._calls:
            raise wire.FrameError(f"an answer to call {number}, during call {self._calls}")
        self._watch()
        return self._reply(wire.unpack_parts(payload))

    def printed(self) -> tuple[str, str, bool]:
        """What the current call printed so far: stdout, stderr, and whether some of it was dropped."""
        out, error, dropped = screen.read_screen(self._screen_fd, self._capacity)
        return out.decode("utf-8", "replace"), error.decode("utf-8", "replace"), dropped

    def kill(self) -> None:
        """SIGKILL it, from any thread; nothing happens after `release`."""
        if self._free.alive:
            self._handle.send_signal(signal.SIGKILL)

    def release(self) -> None:
        """Kill it, wait for its end and free everything; later calls do nothing."""
        self._free()

    def _receive(self, count: int, deadline: float) -> bytes:
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise CallTimeoutError
            self._stream.settimeout(min(_TICK_SECONDS, remaining))
            try:
                return self._stream.recv(count)
            except TimeoutError:
                self._watch()

    def _reply(self, parts: dict[bytes, bytes]) -> Reply:
        texts = {tag: parts[tag][: self._capacity].decode("utf-8", "replace") for tag in (b"e", b"r") if tag in parts}
        return Reply(
            finished=parts.get(b"s") == b"o",
            error=texts.get(b"e", ""),
            result=texts.get(b"r"),
            truncated=b"t" in parts,
        )


def _free(stream: socket.socket, screen_fd: int, handle: Handle, clean_up: Callable[[], None]) -> None:
    handle.send_signal(signal.SIGKILL)
    handle.wait(_GONE_SECONDS)
    stream.close()
    os.close(screen_fd)
    handle.close()
    clean_up()
