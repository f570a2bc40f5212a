"""A sandbox whose sessions are forked from a warm template process: the base of the local backends.

`Template` is the host's hold on that process: start it, ask it for sessions, notice its end. See `inside.template` for
the other side.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from metis_agent.errors import SandboxGoneError, SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Closing, SandboxLimits
from metis_agent.tools.sandboxes.inside.paths import remove_folder
from metis_agent.tools.sandboxes.inside.wire import HANDLE, Terms, screen_size
from metis_agent.tools.sandboxes.machine import (
    Watch,
    bare_environment,
    inside_folder,
    interpreter,
    pid_of,
    readable_paths,
    site_folders,
    spare_uids,
    tasks_of_user,
)
from metis_agent.tools.sandboxes.process import PidfdHandle, SessionProcess, answer_limits
from metis_agent.tools.sandboxes.session import LocalSession

__all__ = ["DEFAULT_PACKAGES", "PATIENCE_SECONDS", "Template", "TemplatePlan", "WarmSandbox", "new_screen"]

PATIENCE_SECONDS = 0.1
"""A dying template's sessions can be gone before it is; so long one waits to tell the two apart."""

_BOOT = """
import os, sys
room = [bytes(400) for _ in range(25_000)][::1000]
sys.path.insert(0, sys.argv[1])
os.register_at_fork = lambda **_: None
from inside.template import main
main(room)
"""
"""A fork costs what it copies. `room` has Python take 10 MB in one piece, before libraries lie in between; see
`inside.linux.join_pages`. What `threading`, `random` and `logging` do after a fork is of use beside other threads."""
_START_SECONDS = 60.0
_FORK_SECONDS = 30.0
_STOP_SECONDS = 10.0
_SPARE_TASKS = 4096
_F_ADD_SEALS, _SEAL_ALL_BUT_WRITE = 1033, 0x1 | 0x2 | 0x4


@dataclass(frozen=True, kw_only=True)
class TemplatePlan:
    """What differs between backends."""

    prefix: Sequence[str]
    """Arguments before the interpreter's."""
    settings: Mapping[str, Any]
    """`folder`, `boxed`, `readable`, `site`, `packages`, `uids`, `landlock_abi`, `namespaces`: see `inside.contain`."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A session that the template was asked for."""

    limits: SandboxLimits
    name: str
    stream: socket.socket
    screen: int

    def close(self) -> None:
        self.stream.close()
        os.close(self.screen)


class Template:
    """A running template process; made once it is warm and has said so.

    Raises:
        SandboxUnavailableError: it did not start; the message has its own words.
    """

    def __init__(self, plan: TemplatePlan) -> None:
        self._plan = plan
        self._opened = 0
        self._keeping = threading.Lock()
        self._spares: list[_Begun] = []
        """One at most, contained while nobody waits: the next session begins at once."""
        self._stopped = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process: subprocess.Popen[bytes] | None = None
        with theirs, tempfile.TemporaryFile() as words:
            try:
                process = self._process = _launch(plan, theirs.fileno(), words)
                theirs.close()
                self._handle, greeting = self._await_greeting()
            except (OSError, EOFError) as error:
                self._control.close()
                _end(process)
                words.seek(0)
                said = words.read(1 << 16).decode("utf-8", "replace").split("\n")
                last = next((line for line in reversed(said) if line.strip()), str(error))
                raise SandboxUnavailableError(f"the sandbox process did not start: {last}") from error
        self._own_mount, self._own_count = bool(greeting["own_mount"]), bool(greeting["own_count"])
        pid = pid_of(self._handle.fd)
        self._base_memory = _address_space(pid)
        self._tasks = tasks_of_user() + _SPARE_TASKS
        # Sessions are the first to go when the machine runs out of memory.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as score:
            score.write("1000")

    def alive(self, patience: float = 0.0) -> bool:
        """Whether it still runs, `patience` seconds from now at the latest."""
        return not self._stopped and not self._handle.wait(patience)

    def fork(self, limits: SandboxLimits) -> SessionProcess:
        """A fresh, contained session process.

        Raises:
            SandboxGoneError: the template died.
            SandboxUnavailableError: the session could not be contained, and so was not started.
        """
        process = self._spare_for(limits) or self._contained(self._begin(limits))
        if self._opened > 1:
            # A second one was wanted, and so perhaps a third.
            with self._keeping, contextlib.suppress(SandboxGoneError, OSError):
                if not self._spares:
                    self._spares.append(self._begin(limits))
        return process

    def stop(self) -> None:
        """End it and all its sessions; once."""
        self._stopped = True
        self._drop_spares()
        self._control.close()
        if not self._handle.wait(_STOP_SECONDS):
            self._handle.send_signal(signal.SIGKILL)
            self._process.kill()
        self._process.wait()
        self._handle.close()
        if not self._plan.settings["boxed"]:
            remove_folder(self._plan.settings["folder"])

    def forget(self) -> None:
        """In a forked copy of the host: let go of what belongs to the original."""
        self._stopped = True
        self._drop_spares()
        self._control.close()
        self._handle.close()

    def _begin(self, limits: SandboxLimits) -> _Begun:
        """Ask for a session, and don't wait for it."""
        self._opened += 1
        name = f"{os.getpid()}-{self._opened}-{os.urandom(4).hex()}"
        ours, theirs = socket.socketpair()
        begun = _Begun(limits=limits, name=name, stream=ours, screen=new_screen(limits.output_bytes))
        try:
            with theirs:
                socket.send_fds(self._control, [self._request(limits, name)], [theirs.fileno(), begun.screen])
        except OSError as error:
            begun.close()
            raise SandboxGoneError(f"the sandbox's template process did not answer: {error}") from error
        return begun

    def _contained(self, begun: _Begun) -> SessionProcess:
        """Wait until the session is."""
        try:
            handle = _await_ready(begun.stream)
        except BaseException as error:
            begun.close()
            if isinstance(error, OSError | EOFError):
                raise SandboxGoneError(f"the sandbox's template process did not answer: {error}") from error
            raise
        limits = begun.limits
        folder = None if self._own_mount else os.path.join(self._plan.settings["folder"], begun.name)
        threads = None if self._own_count else limits.processes
        watched = threads is not None or folder is not None
        watch = Watch(handle, folder=folder, disk_mb=limits.disk_mb, threads=threads) if watched else None
        return SessionProcess(
            stream=begun.stream,
            screen_fd=begun.screen,
            answer=answer_limits(limits),
            handle=handle,
            watch=watch,
            backend_alive=lambda: self.alive(PATIENCE_SECONDS),
            clean_up=lambda: remove_folder(folder) if folder is not None else None,
        )

    def _spare_for(self, limits: SandboxLimits) -> SessionProcess | None:
        """The session that was begun ahead of time, where it has these limits and still lives."""
        try:
            begun = self._spares.pop()
            process = self._contained(begun)
        except (IndexError, SandboxGoneError, SandboxUnavailableError):
            return None
        if begun.limits == limits and process.alive():
            return process
        process.release()
        return None

    def _drop_spares(self) -> None:
        # No lock: a thread that is not in this fork of the host may hold it.
        while self._spares:
            self._spares.pop().close()

    def _request(self, limits: SandboxLimits, name: str) -> bytes:
        terms = Terms(
            memory=self._base_memory + (limits.memory_mb << 20),
            disk=limits.disk_mb << 20,
            threads=limits.processes,
            tasks=self._tasks,
            **answer_limits(limits)._asdict(),
        )
        return terms.pack(name)

    def _await_greeting(self) -> tuple[PidfdHandle, dict[str, Any]]:
        self._control.settimeout(_START_SECONDS)
        self._control.send(json.dumps(self._plan.settings).encode())
        message, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 1, socket.MSG_CMSG_CLOEXEC)
        if not message or not fds:
            raise EOFError("it ended without a word")
        return PidfdHandle(fds[0]), json.loads(message)


def new_screen(capacity: int) -> int:
    """Shared memory of a fixed size; the descriptor is the caller's to close."""
    import fcntl  # not on Windows, where the rest of this package can still be imported

    fd = os.memfd_create("metis-screen", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, screen_size(capacity))
    fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_ALL_BUT_WRITE)
    return fd


def _launch(plan: TemplatePlan, control: int, words: IO[bytes]) -> subprocess.Popen[bytes]:
    host = os.pidfd_open(os.getpid())
    command = [interpreter(), "-I", "-S", "-B", "-c", _BOOT, inside_folder(), str(control), str(host)]
    try:
        return subprocess.Popen(
            [*plan.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            cwd="/",
            env=bare_environment(),
            pass_fds=(control, host),
            # Ctrl-C in the host's terminal is the host's to handle.
            start_new_session=True,
        )
    finally:
        os.close(host)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """Wait for a process that is ending by itself; not for ever."""
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        process.kill()
        process.wait()


def _await_ready(stream: socket.socket) -> PidfdHandle:
    stream.settimeout(_FORK_SECONDS)
    begin, fds, _, _ = socket.recv_fds(stream, len(HANDLE), 1, socket.MSG_CMSG_CLOEXEC)
    handle = PidfdHandle(fds[0]) if fds else None
    try:
        message = stream.recv(4096)
    except BaseException:
        if handle is not None:
            handle.close()
        raise
    if message == b"ready" and handle is not None:
        return handle
    if handle is None:
        message = begin + message
    else:
        handle.close()
    if not message:
        raise EOFError("the stream closed before the session was ready")
    raise SandboxUnavailableError(f"a session could not be contained: {message.decode('utf-8', 'replace')}")


def _address_space(pid: int) -> int:
    """Bytes of address space that a process has mapped."""
    with open(f"/proc/{pid}/statm") as sizes:
        return int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


DEFAULT_PACKAGES = ("numpy", "PIL")
"""Loaded before the first session where they are installed. Where sessions often plot, "matplotlib.pyplot" spares
each of them about half a second, and costs it about 1 ms to start."""


class WarmSandbox(Closing):
    """See `Sandbox`. Nothing starts before the first `open`; a template that died is replaced by the next.

    Args:
        limits: of a session that asks for no others.
        packages: to import once, so that sessions have them at no cost; absent ones are passed over.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, packages: Iterable[str] = DEFAULT_PACKAGES) -> None:
        self._limits = limits or SandboxLimits()
        self._packages = tuple(packages)
        self._lock = threading.Lock()
        self._template: Template | None = None
        self._owner = os.getpid()
        self._finalizer: weakref.finalize[..., WarmSandbox] | None = None
        self._closed = False

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Sandbox.name`."""

    @abstractmethod
    def _plan(self) -> TemplatePlan:
        """How to start a template; makes what it needs, such as a folder.

        Raises:
            SandboxUnavailableError: something that this backend needs is absent.
        """

    @property
    def limits(self) -> SandboxLimits:
        """See `Sandbox.limits`."""
        return self._limits

    def open(self, limits: SandboxLimits | None = None) -> LocalSession:
        """See `Sandbox.open`."""
        chosen = limits or self._limits
        return LocalSession(start=lambda: self._fork(chosen), limits=chosen)

    def close(self) -> None:
        """See `Sandbox.close`."""
        with self._lock:
            self._closed = True
            self._drop_template()

    def _settings(self, *, folder: str, boxed: bool, namespaces: bool, landlock_abi: int) -> dict[str, Any]:
        """What `TemplatePlan` holds."""
        return {
            "folder": folder,
            "boxed": boxed,
            "namespaces": namespaces,
            "readable": readable_paths(),
            "site": site_folders(),
            "packages": self._packages,
            "uids": spare_uids(os.getpid()),
            "landlock_abi": landlock_abi,
        }

    def _fork(self, limits: SandboxLimits) -> SessionProcess:
        template = self._running_template()
        try:
            return template.fork(limits)
        except SandboxGoneError:
            # It died since the last look: one more try, with a new one.
            if template.alive(PATIENCE_SECONDS):
                raise
            return self._running_template().fork(limits)

    def _running_template(self) -> Template:
        with self._lock:
            if self._closed:
                raise SandboxGoneError("this sandbox is closed; make another one.")
            if self._template is not None and self._owner != os.getpid():
                # A fork of the host: the template and its end belong to the original.
                if self._finalizer is not None:
                    self._finalizer.detach()
                self._template.forget()
                self._template = None
            if self._template is not None and not self._template.alive():
                self._drop_template()
            if self._template is None:
                self._template = Template(self._plan())
                self._owner = os.getpid()
                self._finalizer = weakref.finalize(self, self._template.stop)
            return self._template

    def _drop_template(self) -> None:
        self._template = None
        if self._finalizer is not None and self._owner == os.getpid():
            self._finalizer()
