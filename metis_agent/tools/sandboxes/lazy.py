"""A sandbox that is found and tested when it is first needed."""

from __future__ import annotations

import threading

from metis_agent.errors import SandboxUnavailableError
from metis_agent.tools.sandboxes.base import Sandbox, SandboxSession
from metis_agent.tools.sandboxes.choose import Backend, open_sandbox
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.selftest import failures

__all__ = ["LazySandbox"]


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
