"""Finds a sandbox that contains on this machine, or says why there is none.

Order: E2B, where a key is set; bubblewrap + Landlock + seccomp; Landlock + seccomp. The first that passes the
functional self-test is used: a backend is chosen for what it does, not for being installed, since a kernel option, a
container or a security module can take away any part of it.
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from metis_agent.errors import ConfigurationError, InfrastructureError, SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Sandbox, SandboxLimits, SandboxSession
from metis_agent.tools.sandboxes.e2b.sandbox import KEY_VARIABLE, E2BSandbox
from metis_agent.tools.sandboxes.inside.paths import everyone_may_enter
from metis_agent.tools.sandboxes.local import BubblewrapSandbox, LandlockSandbox, UnsafeSandbox

__all__ = ["NOT_TRIED", "Backend", "BackendReport", "LazySandbox", "diagnose", "failures", "open_sandbox"]

NOT_TRIED = "not tried: that needs the network"

Backend = Literal["auto", "e2b", "bubblewrap", "landlock", "unsafe"]

_CONTAINED: dict[str, Callable[[SandboxLimits | None], Sandbox]] = {
    "e2b": E2BSandbox,
    "bubblewrap": BubblewrapSandbox,
    "landlock": LandlockSandbox,
}

_REMEDY = (
    "Install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`), or use a Linux kernel 5.13 or "
    "newer with Landlock switched on; in a container, allow user namespaces or Landlock in its seccomp profile. "
    "Or use E2B's cloud: set E2B_API_KEY and `pip install 'langgraph-metis[e2b]'`. "
    "To run code without containment, on your own risk, pass allow_unsafe=True."
)


@dataclass(frozen=True, kw_only=True)
class BackendReport:
    """How one backend fared on this machine."""

    backend: str
    works: bool
    problems: tuple[str, ...] = ()


def open_sandbox(
    limits: SandboxLimits | None = None, *, backend: Backend = "auto", allow_unsafe: bool = False
) -> Sandbox:
    """A sandbox that was seen to contain.

    Args:
        limits: of a session that asks for no others.
        backend: which one; `auto` takes the first that works.
        allow_unsafe: with `auto`, run code without containment where nothing contains (and warn); needed for
            `backend="unsafe"`.

    Raises:
        ConfigurationError: the backend's name is unknown, or is `unsafe` without the flag.
        SandboxUnavailableError: none works; the message says what was tried, why each failed, what to do.
    """
    if backend not in get_args(Backend):
        raise ConfigurationError(f"backend={backend!r}: it must be one of {', '.join(get_args(Backend))}.")
    if backend == "unsafe":
        return UnsafeSandbox(limits, allow_unsafe=allow_unsafe)
    reports: list[BackendReport] = []
    for name in _CONTAINED if backend == "auto" else (backend,):
        report, sandbox = _try(name, limits)
        if sandbox is not None:
            _say_if_not_as_set_up(reports, name)
            return sandbox
        reports.append(report)
    if backend == "auto" and allow_unsafe:
        return UnsafeSandbox(limits, allow_unsafe=True)
    tried = "\n".join(f"- {report.backend}: {'; '.join(report.problems)}" for report in reports)
    raise SandboxUnavailableError(f"no sandbox works on this machine. Tried:\n{tried}\n{_REMEDY}")


def diagnose(limits: SandboxLimits | None = None, *, online: bool = False) -> list[BackendReport]:
    """Try every contained backend and tell how each fared; for `metis doctor`.

    Args:
        limits: of the sessions.
        online: also try E2B, over the network, where a key is set.
    """
    reports = []
    for name in _CONTAINED:
        if name == "e2b" and os.environ.get(KEY_VARIABLE) and not online:
            reports.append(BackendReport(backend=name, works=False, problems=(NOT_TRIED,)))
            continue
        report, sandbox = _try(name, limits)
        if sandbox is not None:
            sandbox.close()
        reports.append(report)
    return reports


def _try(name: str, limits: SandboxLimits | None) -> tuple[BackendReport, Sandbox | None]:
    if name != "e2b" and sys.platform != "linux":
        return BackendReport(backend=name, works=False, problems=(f"it needs Linux, not {sys.platform}",)), None
    try:
        sandbox = _CONTAINED[name](limits)
    except ConfigurationError as error:  # E2B without a key, or without its SDK
        return BackendReport(backend=name, works=False, problems=(str(error),)), None
    try:
        problems = failures(sandbox)
    except InfrastructureError as error:
        problems = [str(error)]
    if problems:
        sandbox.close()
        return BackendReport(backend=name, works=False, problems=tuple(problems)), None
    return BackendReport(backend=name, works=True), sandbox


def _say_if_not_as_set_up(reports: list[BackendReport], name: str) -> None:
    """A key says that E2B is wanted; what is used instead contains as well, but is another machine."""
    for report in reports:
        if report.backend == "e2b" and os.environ.get(KEY_VARIABLE):
            problems = "; ".join(report.problems)
            message = f"{KEY_VARIABLE} is set, but E2B does not work: {problems} Code runs in {name} instead."
            warnings.warn(message, RuntimeWarning, stacklevel=3)


_LOOP_SECONDS = 0.1

_ESCAPES = """
import os, socket
escapes = {{
    "read a file outside": lambda: open({secret!r}).read(),
    "wrote a file outside": lambda: open({secret!r} + ".written", "w"),
    "read the host's environment": lambda: open("/proc/{host}/environ").read(),
    "signalled the host": lambda: os.kill({host} if {host} != os.getpid() else 1, 0),
    "opened a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "started a process": lambda: os.fork() or os._exit(0),
    "used {memory} MB more memory than it may": lambda: bytearray(2 * {memory} << 20),
}}
succeeded = []
for name, attempt in escapes.items():
    try:
        attempt()
        succeeded.append(name)
    except (OSError, MemoryError):
        pass
succeeded
"""

# On a machine of its own code may start processes and fill the memory; but is it one?
_REMOTE_ESCAPES = """
import socket
escapes = {{
    "read a file of this machine": lambda: open({secret!r}).read(),
    "wrote a file of this machine": lambda: open({secret!r}, "r+"),
    "reached the internet": lambda: {internet} or socket.create_connection(("1.1.1.1", 443), timeout=1).close(),
}}
succeeded = []
for name, attempt in escapes.items():
    try:
        if attempt() is not True:
            succeeded.append(name)
    except OSError:
        pass
succeeded
"""

_WORK = """
import colorsys, os
with open("note", "w") as note:
    note.write("kept")
open("note").read(), os.getcwd() == os.path.abspath(".")
"""


def failures(sandbox: Sandbox) -> list[str]:
    """What is wrong with a sandbox, in words; an empty list where it works and contains.

    Raises:
        SandboxUnavailableError: it can't start.
        SandboxGoneError: it died under the test.
    """
    remote = isinstance(sandbox, E2BSandbox)
    parent = tempfile.gettempdir() if everyone_may_enter(os.path.realpath(tempfile.gettempdir())) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="metis-probe-", dir=parent) as folder, sandbox.open() as session:
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        # Open to every uid, so that only the sandbox can be what refuses.
        os.chmod(secret, 0o666)
        os.chmod(folder, 0o777)
        wrong = []
        work = session.run(_WORK)
        if work.result != "('kept', True)":
            wrong.append(f"ordinary code does not run in it: {work.traceback or work.reason or work.result}")
        names: Mapping[str, object] = {
            "secret": secret,
            "host": os.getpid(),
            "memory": sandbox.limits.memory_mb,
            "internet": getattr(sandbox, "internet", False),
        }
        escaped = session.run((_REMOTE_ESCAPES if remote else _ESCAPES).format_map(names))
        if escaped.status != "ok":
            wrong.append(f"the attempts to escape did not run: {escaped.traceback or escaped.reason}")
        else:
            wrong += [f"code in it {name}" for name in ast.literal_eval(escaped.result or "[]")]
        # Of a remote one, the time is kept on this side.
        if not remote and session.run("while True: pass", timeout=_LOOP_SECONDS).status != "timeout":
            wrong.append("an endless loop was not stopped")
        return wrong


class LazySandbox:
    """Holds a sandbox: a given one, or its own, opened at the first use. Thread-safe.

    Args:
        given: the caller's, which the caller closes; `None` for an own one.
        limits: of the sessions.
        backend: which one to open, where none is given.
        allow_unsafe: as for `open_sandbox`.
    """

    def __init__(self, given: Sandbox | None, *, limits: SandboxLimits, backend: Backend, allow_unsafe: bool) -> None:
        self._given, self._limits, self._backend, self._allow_unsafe = given, limits, backend, allow_unsafe
        self._lock = threading.Lock()
        self._own: Sandbox | None = None

    def open_session(self) -> SandboxSession:
        """A fresh session.

        Raises:
            SandboxUnavailableError: nothing contains code on this machine.
        """
        return self._sandbox().open(self._limits)

    def check(self) -> str:
        """Test it now; gives its name.

        Raises:
            SandboxUnavailableError: nothing contains code on this machine, or the given one does not.
        """
        sandbox = self._sandbox()
        problems = failures(sandbox) if sandbox is self._given else []
        if problems:
            raise SandboxUnavailableError(f"the sandbox {sandbox.name!r} does not hold: {'; '.join(problems)}.")
        return sandbox.name

    def close(self) -> None:
        """Close an own sandbox; the next use opens another."""
        with self._lock:
            own, self._own = self._own, None
        if own is not None:
            own.close()

    def _sandbox(self) -> Sandbox:
        if self._given is not None:
            return self._given
        with self._lock:
            if self._own is None:
                self._own = open_sandbox(self._limits, backend=self._backend, allow_unsafe=self._allow_unsafe)
            return self._own
