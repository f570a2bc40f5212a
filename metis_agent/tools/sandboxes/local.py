"""The three local backends: bubblewrap, Landlock, and a plain process that contains nothing.

**Bubblewrap**, with Landlock (where the kernel has it) and seccomp on top. The template runs in namespaces of its own:
a read-only file system that holds the interpreter's library, installed packages, shared libraries and fonts, and
nothing else; no network; no other processes; no /proc. Each session then gets its own mount namespace with a tmpfs of
limited size as `/tmp`, its work folder, so that the kernel holds the disk limit and other paths do not even exist. Its
files count as memory of the machine, beyond the session's memory limit. Works as root and, where the kernel allows user
namespaces, as an ordinary user. The session's rights to mount are given up before any code runs.

**Landlock** and seccomp, without root and without anything to install. Contained: reading and writing outside the
session's own folder (but for the interpreter's library, installed packages, shared libraries and fonts, which it may
read), the network, other processes (signals, ptrace, memory), new processes and programs, memory, time, output,
threads. Where the kernel lets this user make namespaces, a session's folder is a tmpfs of its own and its threads are
counted alone, so that the kernel holds both limits; its files then count as memory of the machine. Where not (many
containers), the size of one file is held by the kernel, and the host counts the sum, deleted files that are still open
or mapped included, and the threads of an ordinary user: every 50 ms at most, sooner as the limit comes nearer, the
process standing still. A session over its limit is killed, and can exceed it by what it takes in that time. Not
contained: metadata. Code can learn whether a path exists, its size and its times (`stat`), where the file permissions
of its uid allow that. Needs Linux 5.13 or newer with Landlock switched on. Each ABI below 6 lacks something (truncation
before 3, TCP before 4, signals before 6); the system-call filter refuses those in any case.

**A plain subprocess** is *not a sandbox*: code in it can read and change all that the user can. For machines where
nothing contains code and its author is trusted. It has the timeout, the output cap and the session of the real
backends, and a process of its own, so a crash stays there. Behind an explicit flag, and it warns.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from metis_agent.errors import ConfigurationError, SandboxGoneError, SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Closing, SandboxLimits
from metis_agent.tools.sandboxes.inside.linux import supported_abi
from metis_agent.tools.sandboxes.inside.paths import everyone_may_enter, remove_folder
from metis_agent.tools.sandboxes.inside.wire import screen_size
from metis_agent.tools.sandboxes.machine import (
    bare_environment,
    inside_folder,
    interpreter,
    readable_paths,
    site_folders,
)
from metis_agent.tools.sandboxes.process import PopenHandle, SessionProcess, answer_limits
from metis_agent.tools.sandboxes.session import LocalSession
from metis_agent.tools.sandboxes.template import DEFAULT_PACKAGES, TemplatePlan, WarmSandbox

__all__ = ["BubblewrapSandbox", "LandlockSandbox", "UnsafeSandbox", "UnsafeSandboxWarning"]

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_WORK = ("/tmp", "/work", "/metis-work-folder")


class BubblewrapSandbox(WarmSandbox):
    """See the module's docstring.

    Args:
        limits: of a session that asks for no others.
        packages: to import once, so that sessions have them at no cost.
        program: bubblewrap's program; by default `bwrap` on the path.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        packages: Iterable[str] = DEFAULT_PACKAGES,
        program: str | None = None,
    ) -> None:
        super().__init__(limits, packages=packages)
        self._program = program

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return "bubblewrap + Landlock + seccomp" if supported_abi() else "bubblewrap + seccomp"

    def _plan(self) -> TemplatePlan:
        program = self._program or shutil.which("bwrap")
        if program is None:
            raise SandboxUnavailableError("bubblewrap is not installed (no `bwrap` on the path).")
        bound = (*readable_paths(), interpreter(), os.path.join(inside_folder(), "inside"))
        work = _work_folder(bound)
        settings = self._settings(folder=work, boxed=True, namespaces=True, landlock_abi=supported_abi())
        arguments = _arguments(own_uids=bool(settings["uids"]), bound=bound, work=work)
        return TemplatePlan(prefix=[program, *arguments], settings=settings)


def _work_folder(bound: Sequence[str]) -> str:
    """`/tmp`; or another, where a virtual environment lies below it: a session's own mount would hide that."""
    return next(folder for folder in _WORK if not any(PurePath(path).is_relative_to(folder) for path in bound))


def _arguments(*, own_uids: bool, bound: Sequence[str], work: str) -> list[str]:
    arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--hostname", "sandbox", "--as-pid-1", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if own_uids:
        arguments += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        arguments.append("--unshare-user")
    # Writable for the packages that are imported beforehand; each session mounts its own over it.
    arguments += ["--tmpfs", work, "--setenv", "TMPDIR", work]
    if own_uids:
        # Folders that bubblewrap makes on the way to a bound one are otherwise closed to other uids.
        for folder in sorted({str(parent) for path in bound for parent in PurePath(path).parents} - {"/"}):
            arguments += ["--perms", "0755", "--dir", folder]
    for path in bound:
        arguments += ["--ro-bind", path, path]
    for device in _DEVICES:
        arguments += ["--dev-bind", device, device]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]


_FOLDER_NAME = "metis-sandbox-"


class LandlockSandbox(WarmSandbox):
    """See the module's docstring.

    Args:
        limits: of a session that asks for no others.
        packages: to import once, so that sessions have them at no cost.
        abi: use no Landlock rights newer than this ABI; by default all that the kernel has.
        namespaces: give each session namespaces of its own, where the kernel lets this user make some.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        packages: Iterable[str] = DEFAULT_PACKAGES,
        abi: int | None = None,
        namespaces: bool = True,
    ) -> None:
        super().__init__(limits, packages=packages)
        self._abi, self._namespaces = abi, namespaces

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return "Landlock + seccomp"

    def _plan(self) -> TemplatePlan:
        kernel = supported_abi()
        if not kernel:
            raise SandboxUnavailableError(
                "the kernel offers no Landlock (Linux 5.13 or newer, with `landlock` in the `lsm=` boot option)."
            )
        _sweep()
        folder = tempfile.mkdtemp(prefix=f"{_FOLDER_NAME}{os.getpid()}-", dir=_parent())
        # Sessions of another uid pass through; only each one's own folder in it is open to it.
        os.chmod(folder, 0o711)
        abi = min(kernel, self._abi or kernel)
        settings = self._settings(folder=folder, boxed=False, namespaces=self._namespaces, landlock_abi=abi)
        return TemplatePlan(prefix=(), settings=settings)


def _parent() -> str:
    """Where work folders go; as root, sessions have another uid, to which a private TMPDIR is shut."""
    chosen = os.path.realpath(tempfile.gettempdir())
    return chosen if os.geteuid() != 0 or everyone_may_enter(chosen) else "/tmp"


def _sweep() -> None:
    """Remove folders whose host and template were both killed before either could do it."""
    parent = _parent()
    for name in os.listdir(parent):
        owner = re.match(rf"{_FOLDER_NAME}(\d+)-", name)
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            if owner and not os.path.exists(f"/proc/{owner[1]}") and os.lstat(path).st_uid == os.getuid():
                remove_folder(path)


_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.session import main_uncontained; main_uncontained()"
_START_SECONDS = 60.0


class UnsafeSandboxWarning(RuntimeWarning):
    """Code from a model is about to run without containment."""


class UnsafeSandbox(Closing):
    """See the module's docstring.

    Args:
        limits: of a session that asks for no others; memory and disk are held only roughly.
        allow_unsafe: must be `True`; says that the risk is taken on purpose.

    Raises:
        ConfigurationError: `allow_unsafe` is not `True`.
    """

    def __init__(self, limits: SandboxLimits | None = None, *, allow_unsafe: bool = False) -> None:
        if allow_unsafe is not True:
            raise ConfigurationError(
                f"UnsafeSandbox(allow_unsafe={allow_unsafe!r}): it runs code with all the rights of this user. Pass "
                "allow_unsafe=True only where you trust whoever writes the code; otherwise use open_sandbox()."
            )
        warnings.warn(
            "UnsafeSandbox does not contain the code it runs: it can read, change and send whatever this user can.",
            UnsafeSandboxWarning,
            stacklevel=2,
        )
        self._limits = limits or SandboxLimits()
        self._closed = False

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return "no containment"

    @property
    def limits(self) -> SandboxLimits:
        """See `Sandbox.limits`."""
        return self._limits

    def open(self, limits: SandboxLimits | None = None) -> LocalSession:
        """See `Sandbox.open`."""
        chosen = limits or self._limits
        return LocalSession(start=lambda: self._start(chosen), limits=chosen)

    def close(self) -> None:
        """No more sessions; those that are open end on their own `close`."""
        self._closed = True

    def _start(self, limits: SandboxLimits) -> SessionProcess:
        if self._closed:
            raise SandboxGoneError("this sandbox is closed; make another one.")
        ours, theirs = socket.socketpair()
        folder = tempfile.mkdtemp(prefix="metis-unsafe-")
        screen = _new_screen(limits.output_bytes)
        try:
            with theirs:
                process = _launch(theirs.fileno(), screen, folder, limits)
            ours.settimeout(_START_SECONDS)
            message = ours.recv(4096)
            if message != b"ready":
                raise SandboxGoneError(f"the process did not start: {message.decode('utf-8', 'replace')}")
        except BaseException as error:
            ours.close()
            os.close(screen)
            remove_folder(folder)
            if isinstance(error, OSError):
                raise SandboxGoneError(f"the process did not start: {error}") from error
            raise
        return SessionProcess(
            stream=ours,
            screen_fd=screen,
            answer=answer_limits(limits),
            handle=PopenHandle(process),
            watch=None,
            backend_alive=lambda: True,
            clean_up=lambda: remove_folder(folder),
        )


def _new_screen(capacity: int) -> int:
    """As `template.new_screen`, on systems without memfd as well."""
    with tempfile.TemporaryFile() as file:
        file.truncate(screen_size(capacity))
        return os.dup(file.fileno())


def _launch(stream: int, screen: int, folder: str, limits: SandboxLimits) -> subprocess.Popen[bytes]:
    settings = {
        "site": site_folders(),
        "folder": folder,
        "memory": limits.memory_mb << 20,
        "disk": limits.disk_mb << 20,
        "answer": answer_limits(limits),
    }
    arguments = [inside_folder(), str(stream), str(screen), json.dumps(settings)]
    return subprocess.Popen(
        [interpreter(), "-I", "-S", "-B", "-c", _BOOT, *arguments],
        # Its end tells the process that the host is gone.
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=bare_environment() | {"HOME": folder, "TMPDIR": folder},
        pass_fds=(stream, screen),
        start_new_session=sys.platform != "win32",
    )
