"""The host's hold on one session's process: send a call, wait, and end it whatever it does.

Between calls the process is stopped (SIGSTOP), so threads that a call left behind use no time and send
nothing. What it sends is capped and checked; see `inside.wire`. What the kernel can't limit is watched during a call.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from metis_agent.tools.sandboxes.base import SandboxLimits
from metis_agent.tools.sandboxes.inside import wire
from metis_agent.tools.sandboxes.inside.wire import AnswerLimits

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CallTimeoutError",
    "Handle",
    "LimitExceededError",
    "PidfdHandle",
    "PopenHandle",
    "Reply",
    "SessionProcess",
    "answer_limits",
    "folder_bytes",
    "pid_of",
    "watch_session",
]

_TICK_SECONDS = 0.05
_GONE_SECONDS = 5.0
_FRAME_OVERHEAD = 1024
_EMPTY = memoryview(b"")


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
        watch: called now and then during a call and after it; raises `LimitExceededError`.
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
        watch: Callable[[], None],
        backend_alive: Callable[[], bool],
        clean_up: Callable[[], None],
    ) -> None:
        self._stream, self._screen_fd, self._limits = stream, screen_fd, answer
        self._handle, self._watch = handle, watch
        self.backend_alive = backend_alive
        self._calls = 0
        self._paused = False
        # Also at garbage collection and at exit: nobody is left to close it then.
        self._free = weakref.finalize(self, _free, stream, screen_fd, handle, clean_up)

    def call(self, code: bytes, seconds: float, images: Mapping[str, Image]) -> Reply:
        """Run code in the process, with names bound to images first.

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
            for name, image in images.items():
                picture = (image.width, image.height, image.tobytes())
                self._send(wire.pack_input(self._calls, name, image.mode, picture), deadline)
            self._send([wire.pack_frame(self._calls, wire.pack_parts({b"c": code}))], deadline)
            number, payload = wire.read_frame(lambda count: self._receive(count, deadline), self._most_bytes())
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
        out, error, dropped = wire.read_screen(self._screen_fd, self._limits.text)
        return out.decode("utf-8", "replace"), error.decode("utf-8", "replace"), dropped

    def kill(self) -> None:
        """SIGKILL it, from any thread; nothing happens after `release`."""
        if self._free.alive:
            self._handle.send_signal(signal.SIGKILL)

    def release(self) -> None:
        """Kill it, wait for its end and free everything; later calls do nothing."""
        self._free()

    def _send(self, pieces: Iterable[bytes | memoryview], deadline: float) -> None:
        for piece in pieces:
            self._stream.settimeout(max(0.001, deadline - time.monotonic()))
            self._stream.sendall(piece)

    def _most_bytes(self) -> int:
        """Of an answer."""
        texts, pictures = 3 * self._limits.text, wire.pictures_size(self._limits.pictures, self._limits.pixels)
        return texts + pictures + _FRAME_OVERHEAD

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


_MAX_FILES_PER_MB = 64


def watch_session(*, pid: int, folder: str | None, disk_mb: int, threads: int | None) -> Callable[[], None]:
    """A check of one session, for `SessionProcess`.

    Args:
        pid: of the session, as the host sees it.
        folder: its work folder, where no mount of its own limits it; else `None`.
        disk_mb: MiB that the folder may hold.
        threads: how many it may run, where its uid is shared and RLIMIT_NPROC can't tell; else `None`.
    """

    def check() -> None:
        if threads is not None and _threads(pid) > threads:
            raise LimitExceededError(f"The code ran more than {threads} threads at once.")
        if folder is not None:
            used, files = folder_bytes(folder, most_files=disk_mb * _MAX_FILES_PER_MB)
            if files > disk_mb * _MAX_FILES_PER_MB:
                raise LimitExceededError(f"The code made more than {disk_mb * _MAX_FILES_PER_MB} files.")
            if used + _deleted_bytes(pid, os.stat(folder).st_dev) > disk_mb << 20:
                raise LimitExceededError(f"The code wrote more than {disk_mb} MB of files.")

    return check


def folder_bytes(folder: str, *, most_files: int) -> tuple[int, int]:
    """Bytes on disk below a folder and the number of entries; stops counting past `most_files`."""
    used = count = 0
    waiting = [folder]
    while waiting and count <= most_files:
        for status, subfolder in _entries(waiting.pop(), most_files - count + 1):
            count += 1
            used += status.st_blocks * 512
            if subfolder is not None:
                waiting.append(subfolder)
    return used, count


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, in this process's namespace; -1 when it is gone."""
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        for line in lines:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _entries(folder: str, most: int) -> Iterator[tuple[os.stat_result, str | None]]:
    try:
        # A folder may have been made without the right to list it.
        if not os.access(folder, os.R_OK | os.X_OK):
            os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, most):
                is_folder = entry.is_dir(follow_symlinks=False)
                yield entry.stat(follow_symlinks=False), entry.path if is_folder else None
    except OSError:
        # It vanished meanwhile.
        return


def _deleted_bytes(pid: int, device: int) -> int:
    """Bytes of files that are deleted, and still open: no folder shows them."""
    used = 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{name}")
            if status.st_nlink == 0 and status.st_dev == device:
                used += status.st_blocks * 512
    except OSError:
        return used
    return used
