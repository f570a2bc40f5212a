"""Finds a sandbox that contains on this machine, or says why there is none.

Order: E2B, where a key is set; bubblewrap + Landlock + seccomp; Landlock + seccomp. The first that passes the
functional `selftest` is used.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from metis_agent.errors import ConfigurationError, InfrastructureError, SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Sandbox
from metis_agent.tools.sandboxes.bubblewrap import BubblewrapSandbox
from metis_agent.tools.sandboxes.e2b.sandbox import KEY_VARIABLE, E2BSandbox
from metis_agent.tools.sandboxes.landlock import LandlockSandbox
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.selftest import failures
from metis_agent.tools.sandboxes.unsafe import UnsafeSandbox

__all__ = ["NOT_TRIED", "Backend", "BackendReport", "diagnose", "open_sandbox"]

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
