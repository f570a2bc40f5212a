"""The warm process that forks sessions; started once by the host, and ended by the host's end.

It runs no code of a model. Its control socket carries one message for each session to open: the limits,
and two descriptors (the session's stream, its screen). It answers nothing there; the session itself says
that it is ready. It watches the host (socket and pidfd) and its sessions (pidfds), and when the host is
gone, by whatever death, kills them all and removes their folders.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from typing import Any

from . import linux, paths
from .contain import Containment
from .paths import REHEARSALS, remove_folder
from .pictures import Pictures
from .session import Repl, announce, rehearse, serve
from .wire import HANDLE, Screen, Terms, unpack_terms

__all__ = ["main"]

_STREAM_FD, _SCREEN_FD = 3, 4
_MAX_OPEN_FILES = 8192
_MAX_MESSAGE = 1 << 16
_ONE, _TWO = struct.Struct("i"), struct.Struct("ii")
_ROOM_FOR_TWO = socket.CMSG_LEN(_TWO.size)


def main(room: list[bytes]) -> None:
    """Arguments: a folder to take off the path, the control socket's and the host pidfd's numbers.

    Args:
        room: objects spread over the memory that Python took ahead; freed once it is in use.
    """
    sys.path.remove(sys.argv[1])
    control = socket.socket(fileno=_move_up(int(sys.argv[2])))
    host = _move_up(int(sys.argv[3]))
    settings = json.loads(control.recv(_MAX_MESSAGE))
    template = Template(control, host, settings, room)
    template.greet()
    try:
        template.loop()
    finally:
        template.end_all()


class Template:
    """State of the warm process: its sessions, and the uids that are free."""

    def __init__(self, control: socket.socket, host: int, settings: Mapping[str, Any], room: list[bytes]) -> None:
        self._control, self._host = control, host
        self._folder = None if settings["boxed"] else str(settings["folder"])
        first, count = settings["uids"] or (0, 0)
        self._uids = list(range(first, first + count))
        self._shared_uid = not self._uids
        self._children: dict[int, tuple[int, int | None]] = {}
        self._poll = select.poll()
        for fd in (control.fileno(), host):
            self._poll.register(fd, select.POLLIN)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self._open_files = min(hard, _MAX_OPEN_FILES) if hard != resource.RLIM_INFINITY else _MAX_OPEN_FILES
        resource.setrlimit(resource.RLIMIT_NOFILE, (self._open_files, self._open_files))
        self._prepare(settings, room)

    def _prepare(self, settings: Mapping[str, Any], room: list[bytes]) -> None:
        for fd in (_STREAM_FD, _SCREEN_FD):
            # Held until a session puts its own there, so that nothing else gets these numbers.
            os.dup2(0, fd, inheritable=False)
        # Made here, like all that a fork would only copy.
        end, other = socket.socketpair()
        with end, other:
            os.dup2(end.fileno(), _STREAM_FD, inheritable=False)
        self._stream = socket.socket(fileno=_STREAM_FD)
        paths.add_site_folders(settings["site"])
        paths.warm(settings["packages"])
        paths.be_like_a_console()
        self._seeders = paths.seeders()
        # A session's own mounts bring their own parent folders; without them, its uid may be shut out.
        rerouting = bool(self._uids) and self._folder is not None
        routes = paths.reroute(settings["readable"]) if rerouting else []
        self._first_free = max([_SCREEN_FD, *routes]) + 1
        self._containment = Containment(settings)
        self._screen, pictures = Screen(), Pictures()
        rehearse(self._screen, pictures)
        self._containment.rehearse()
        for _ in range(REHEARSALS):
            unpack_terms(Terms(0, 0, 0, 0, 0, 0, 0).pack(""))
        self._repl = Repl(self._screen, pictures)
        # What exists now is shared with every session; a collection there should not copy its pages.
        places = sorted(map(id, room))
        room.clear()
        gc.collect()
        gc.freeze()
        linux.join_pages(places[0], places[-1])

    def greet(self) -> None:
        """Tell the host that all is ready, with a descriptor of this process."""
        fd = os.pidfd_open(os.getpid())
        contained = self._containment
        message = json.dumps({"own_mount": contained.own_mount, "own_count": contained.own_count}).encode()
        socket.send_fds(self._control, [message], [fd])
        os.close(fd)

    def loop(self) -> None:
        """Fork and reap until the host is gone."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._host:
                    return
                if fd != self._control.fileno():
                    self._reap(fd)
                elif not self._take_request():
                    return

    def end_all(self) -> None:
        """Kill every session, and remove what they wrote."""
        if self._folder is None:
            # First process of its namespace: the kernel kills the others when it ends, and unmounts.
            return
        for pid, _ in self._children.values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        remove_folder(self._folder)

    def _take_request(self) -> bool:
        # Not by `socket.recv_fds`: each line that runs here has the next fork copy what it touches.
        message, passed, _, _ = self._control.recvmsg(_MAX_MESSAGE, _ROOM_FOR_TWO)
        if not message:
            return False
        fds = _TWO.unpack(passed[0][2]) if passed else ()
        try:
            stream, screen = fds
            if self._shared_uid or self._uids:
                self._fork(message, stream, screen)
            else:
                os.write(stream, b"failed: as many sessions are open as this sandbox has uids; close some")
        except OSError as error:
            # No process or descriptor left. The template itself goes on.
            os.write(stream, f"failed: {error}".encode())
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, request: bytes, stream: int, screen: int) -> None:
        uid = self._uids[-1] if self._uids else None
        for seed, size in self._seeders:
            seed(int.from_bytes(os.urandom(size), "little"))
        pid = os.fork()
        if pid == 0:
            try:
                self._become_session(request, uid, stream, screen)
            finally:
                os._exit(1)
        if uid is not None:
            self._uids.pop()
        watched = os.pidfd_open(pid)
        self._children[watched] = (pid, uid)
        self._poll.register(watched, select.POLLIN)

    def _reap(self, watched: int) -> None:
        self._poll.unregister(watched)
        pid, uid = self._children.pop(watched)
        os.close(watched)
        os.waitpid(pid, 0)
        if uid is not None:
            self._uids.append(uid)

    def _become_session(self, request: bytes, uid: int | None, stream: int, screen: int) -> None:
        os.dup2(stream, _STREAM_FD, inheritable=False)
        os.dup2(screen, _SCREEN_FD, inheritable=False)
        for fd in (1, 2):
            os.dup2(0, fd)
        terms, name = unpack_terms(request)

        def prepare() -> None:
            self._containment.enter(terms, name, uid)
            os.closerange(self._first_free, self._open_files)

        # Before any door is closed: a contained process passes no descriptors.
        handle = _ONE.pack(os.pidfd_open(os.getpid()))
        self._stream.sendmsg([HANDLE], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handle)])
        if announce(self._stream, prepare):
            self._screen.attach(_SCREEN_FD, terms.text)
            serve(self._stream, self._screen, self._repl, terms)


def _move_up(fd: int) -> int:
    """The low numbers are for the sessions' descriptors."""
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)
    os.close(fd)
    return moved
