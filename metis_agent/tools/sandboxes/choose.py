"""Finds a sandbox that contains on this machine, or says why there is none.

Order: bubblewrap + Landlock + seccomp, then Landlock + seccomp. The first that passes the functional
`selftest` is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from metis_agent.errors import ConfigurationError, SandboxGoneError, SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Sandbox
from metis_agent.tools.sandboxes.bubblewrap import BubblewrapSandbox
from metis_agent.tools.sandboxes.landlock import LandlockSandbox
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.selftest import failures
from metis_agent.tools.sandboxes.unsafe import UnsafeSandbox

__all__ = ["Backend", "BackendReport", "diagnose", "open_sandbox"]

Backend = Literal["auto", "bubblewrap", "landlock", "unsafe"]

_CONTAINED: dict[str, Callable[[SandboxLimits | None], Sandbox]] = {
    "bubblewrap": BubblewrapSandbox,
    "landlock": LandlockSandbox,
}

_REMEDY = (
    "Install bubblewrap (`apt-get install bubblewrap`, `dnf install bubblewrap`), or use a Linux kernel 5.13 or "
    "newer with Landlock switched on; in a container, allow user namespaces or Landlock in its seccomp profile. "
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
    reports = []
    for name in _CONTAINED if backend == "auto" else (backend,):
        report, sandbox = _try(name, limits)
        if sandbox is not None:
            return sandbox
        reports.append(report)
    if backend == "auto" and allow_unsafe:
        return UnsafeSandbox(limits, allow_unsafe=True)
    tried = "\n".join(f"- {report.backend}: {'; '.join(report.problems)}" for report in reports)
    raise SandboxUnavailableError(f"no sandbox works on this machine. Tried:\n{tried}\n{_REMEDY}")


def diagnose(limits: SandboxLimits | None = None) -> list[BackendReport]:
    """Try every contained backend and tell how each fared; for `metis doctor`."""
    reports = []
    for name in _CONTAINED:
        report, sandbox = _try(name, limits)
        if sandbox is not None:
            sandbox.close()
        reports.append(report)
    return reports


def _try(name: str, limits: SandboxLimits | None) -> tuple[BackendReport, Sandbox | None]:
    if sys.platform != "linux":
        return BackendReport(backend=name, works=False, problems=(f"it needs Linux, not {sys.platform}",)), None
    sandbox = _CONTAINED[name](limits)
    try:
        problems = failures(sandbox)
    except (SandboxUnavailableError, SandboxGoneError) as error:
        problems = [str(error)]
    if problems:
        sandbox.close()
        return BackendReport(backend=name, works=False, problems=tuple(problems)), None
    return BackendReport(backend=name, works=True), sandbox
