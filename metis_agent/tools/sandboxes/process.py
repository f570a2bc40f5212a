"""The host's hold on one session's process: send a call, wait, and end it whatever it does.

Between calls the process is stopped (SIGSTOP), so threads that a call left behind use no time and send
nothing. What it sends is capped and checked; see `inside.wire`. What the kernel can't limit is watched during a call;
see `machine`.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from metis_agent.tools.sandboxes.base import SandboxLimits
from metis_agent.tools.sandboxes.inside import wire
from metis_agent.tools.sandboxes.inside.wire import AnswerLimits
from metis_agent.tools.sandboxes.machine import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CallTimeoutError",
    "Handle",
    "PidfdHandle",
    "PopenHandle",
    "Reply",
    "SessionProcess",
    "answer_limits",
]

_GONE_SECONDS = 5.0
_FRAME_OVERHEAD = 1024
_EMPTY = memoryview(b"")
_PIECE = 1 << 18
_DRIP_BYTES, _DRIP_SECONDS = 1024, 0.001


class CallTimeoutError(Exception):
    """The call did not answer in its time."""


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
    pictures: list[wire.Picture]
    notes: str


def answer_limits(limits: SandboxLimits) -> AnswerLimits:
    """What an answer may carry, as both sides have to know it."""
    return AnswerLimits(text=limits.output_bytes, pictures=limits.images, pixels=limits.image_pixels)


class SessionProcess:
    """One process and the host's ends of its stream and screen.

    Args:
        stream: the connected stream.
        screen_fd: the shared memory of what it prints.
        answer: how much is taken of an answer.
        handle: to signal it.
        watch: looks at it during a call, when it says, and after it.
        backend_alive: whether what started it still runs; if not, its end was not its own doing.
        clean_up: called once, after the process ended.
    """

    def __init__(
        self,
        *,
        stream: socket.socket,
        screen_fd: int,
        answer: AnswerLimits,
        handle: Handle,
        watch: Watch | None,
        backend_alive: Callable[[], bool],
        clean_up: Callable[[], None],
    ) -> None:
        self._stream, self._screen_fd, self._limits = stream, screen_fd, answer
        self._handle, self._watch = handle, watch
        self.backend_alive = backend_alive
        self._calls = 0
        self._pause_between_looks = math.inf if watch is None else 0.0
        self._next_look = math.inf
        self._paused = False
        # Also at garbage collection and at exit: nobody is left to close it then.
        self._free = weakref.finalize(self, _free, stream, screen_fd, handle, clean_up)

    def call(self, code: bytes, deadline: float) -> Reply:
        """Run code in the process.

        Raises:
            CallTimeoutError: no answer before `deadline`, by the monotonic clock.
            EOFError: the process hung up.
            wire.FrameError: it sent something that is not an answer.
            LimitExceededError: it used too much of something.
        """
        self._calls += 1
        with self._conversation():
            self._send([wire.pack_frame(self._calls, wire.pack_parts({b"c": code}))], deadline)
            number, payload = wire.read_frame(lambda count: self._receive(count, deadline), self._most_bytes())
        if number != self._calls:
            raise wire.FrameError(f"an answer to call {number}, during call {self._calls}")
        self._look(running=False)
        return self._reply(wire.unpack_parts(payload))

    def place(self, name: str, image: Image, deadline: float) -> None:
        """Bind a name to an image; what can go wrong is as for `call`."""
        with self._conversation():
            picture = (image.width, image.height, image.tobytes())
            self._send(wire.pack_input(self._calls, name, image.mode, picture), deadline)

    def printed(self) -> tuple[str, str, bool]:
        """What the current call printed so far: stdout, stderr, and whether some of it was dropped."""
        out, error, dropped = wire.read_screen(self._screen_fd, self._limits.text)
        return out.decode("utf-8", "replace"), error.decode("utf-8", "replace"), dropped

    def alive(self) -> bool:
        """Whether it has not ended, nor closed its side, as a process does a moment before its end."""
        side = select.poll()
        side.register(self._stream, 0)
        return not side.poll(0) and not self._handle.wait(0)

    def kill(self) -> None:
        """SIGKILL it, from any thread; nothing happens after `release`."""
        if self._free.alive:
            self._handle.send_signal(signal.SIGKILL)

    def release(self) -> None:
        """Kill it, wait for its end and free everything; later calls do nothing."""
        self._free()

    @contextmanager
    def _conversation(self) -> Iterator[None]:
        """The process runs meanwhile; what breaks off the talk with it is sorted."""
        if self._paused:
            self._handle.send_signal(signal.SIGCONT)
            self._paused = False
        self._next_look = time.monotonic() + self._pause_between_looks
        try:
            yield
        except TimeoutError:
            raise CallTimeoutError from None
        except OSError as error:
            raise EOFError(str(error)) from error
        self._handle.send_signal(signal.SIGSTOP)
        self._paused = True

    def _send(self, pieces: Iterable[bytes | memoryview], deadline: float) -> None:
        for piece in pieces:
            left = memoryview(piece)
            while left:
                self._await_turn(deadline)
                with contextlib.suppress(TimeoutError):
                    left = left[self._stream.send(left[:_PIECE]) :]

    def _most_bytes(self) -> int:
        """Of an answer."""
        texts, pictures = 3 * self._limits.text, wire.pictures_size(self._limits.pictures, self._limits.pixels)
        return texts + pictures + _FRAME_OVERHEAD

    def _receive(self, count: int, deadline: float) -> bytes:
        while True:
            self._await_turn(deadline)
            with contextlib.suppress(TimeoutError):
                piece = self._stream.recv(count)
                if 0 < len(piece) < min(count, _DRIP_BYTES):
                    # A process that drips its answer shall not keep this one busy.
                    time.sleep(_DRIP_SECONDS)
                return piece

    def _await_turn(self, deadline: float) -> None:
        """Look at the process where it is time to, whatever it sends; and say how long to wait for it."""
        now = time.monotonic()
        if now >= self._next_look:
            self._look(running=True)
            now = time.monotonic()
        if now >= deadline:
            raise CallTimeoutError
        self._stream.settimeout(max(0.001, min(deadline, self._next_look) - now))

    def _look(self, *, running: bool) -> None:
        if self._watch is not None:
            self._pause_between_looks = self._watch.look(running=running)
            self._next_look = time.monotonic() + self._pause_between_looks

    def _reply(self, parts: Mapping[bytes, memoryview]) -> Reply:
        limits = self._limits
        texts = {tag: str(parts[tag][: limits.text], "utf-8", "replace") for tag in (b"e", b"r", b"n") if tag in parts}
        pictures = wire.unpack_pictures(parts.get(b"p", _EMPTY), most=limits.pictures, pixels=limits.pixels)
        return Reply(
            finished=bytes(parts.get(b"s", b"")) == b"o",
            error=texts.get(b"e", ""),
            result=texts.get(b"r"),
            truncated=b"t" in parts,
            pictures=pictures,
            notes=texts.get(b"n", ""),
        )


def _free(stream: socket.socket, screen_fd: int, handle: Handle, clean_up: Callable[[], None]) -> None:
    handle.send_signal(signal.SIGKILL)
    handle.wait(_GONE_SECONDS)
    stream.close()
    os.close(screen_fd)
    handle.close()
    clean_up()
