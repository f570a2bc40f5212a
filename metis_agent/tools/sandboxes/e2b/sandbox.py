"""Remote sandboxes of E2B, one for each session."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import weakref

from metis_agent.errors import ConfigurationError, MissingDependencyError, SandboxGoneError
from metis_agent.tools.sandboxes.closing import Closing
from metis_agent.tools.sandboxes.e2b.session import E2BSession, finished
from metis_agent.tools.sandboxes.limits import SandboxLimits

__all__ = ["KEY_VARIABLE", "E2BSandbox"]

KEY_VARIABLE = "E2B_API_KEY"
_LONGEST = 86_400
_SPARE_SECONDS = 60.0


class E2BSandbox(Closing):
    """See `Sandbox`. Each session has a remote sandbox of its own, a virtual machine at E2B.

    Where it is reached is up to the SDK's environment variables (`E2B_DOMAIN`, proxies). Sessions are killed when
    they are closed or forgotten, when this is closed, and when the process ends; if it ends without a chance to
    do so, E2B kills them after `lifetime`.

    Args:
        limits: of a session that asks for no others; memory, processes and disk are up to the template.
        api_key: by default the environment's `E2B_API_KEY`. It never enters a remote sandbox.
        template: what remote sandboxes are made of; by default E2B's `code-interpreter-v1`.
        internet: whether code in it may reach the internet, as in no local sandbox.
        lifetime: seconds that a remote sandbox lives without a call; up to what your plan at E2B allows.
        open_seconds: for making a remote sandbox.

    Raises:
        MissingDependencyError: the SDK is not installed.
        ConfigurationError: there is no key, or a value is out of its range.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        api_key: str | None = None,
        template: str | None = None,
        internet: bool = False,
        lifetime: float = 900.0,
        open_seconds: float = 15.0,
    ) -> None:
        key = api_key or os.environ.get(KEY_VARIABLE)
        if not key:
            raise ConfigurationError(f"{KEY_VARIABLE} is not set. Get a key at https://e2b.dev/dashboard and set it.")
        _check_seconds("lifetime", lifetime)
        _check_seconds("open_seconds", open_seconds)
        try:
            from metis_agent.tools.sandboxes.e2b.service import Service, Settings
        except ImportError as missing:
            raise MissingDependencyError(
                f"E2B's SDK is not installed ({missing}). Install it with: pip install 'langgraph-metis[e2b]'"
            ) from missing
        self._limits = limits or SandboxLimits()
        self._lifetime = lifetime
        self._service = Service(
            Settings(api_key=key, template=template, internet=internet, lifetime=lifetime, open_seconds=open_seconds)
        )
        self._sessions: weakref.WeakSet[E2BSession] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._closed = False
        # Also at the end of the process.
        self._finalizer = weakref.finalize(self, self._service.shut_down)

    @property
    def name(self) -> str:
        """See `Sandbox.name`."""
        return "E2B"

    @property
    def limits(self) -> SandboxLimits:
        """See `Sandbox.limits`."""
        return self._limits

    @property
    def internet(self) -> bool:
        """Whether code in it may reach the internet."""
        return self._service.settings.internet

    def open(self, limits: SandboxLimits | None = None) -> E2BSession:
        """See `Sandbox.open`.

        Raises:
            SandboxUnavailableError: E2B refuses the key.
            SandboxGoneError: E2B can't be reached, failed, or was too slow; or this is closed.
        """
        session = self._new_session(limits)
        finished(self._service.loop.submit(session.start()))
        return session

    async def aopen(self, limits: SandboxLimits | None = None) -> E2BSession:
        """As `open`, for async code; what a cancelled one makes is killed."""
        session = self._new_session(limits)
        await asyncio.wrap_future(self._service.loop.submit(session.start()))
        return session

    def close(self) -> None:
        """See `Sandbox.close`. Waits up to 5 s for E2B to confirm."""
        with self._lock:
            self._closed = True
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._finalizer()

    def _new_session(self, limits: SandboxLimits | None) -> E2BSession:
        chosen = limits or self._limits
        if chosen.seconds + _SPARE_SECONDS > self._lifetime:
            raise ConfigurationError(
                f"E2BSandbox(lifetime={self._lifetime!r}): calls may take {chosen.seconds:g} s; give it at least "
                f"{_SPARE_SECONDS:g} s more than that."
            )
        with self._lock:
            if self._closed:
                raise SandboxGoneError("this sandbox is closed; make another one.")
            session = E2BSession(service=self._service, owner=self, limits=chosen)
            self._sessions.add(session)
        return session


def _check_seconds(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value <= _LONGEST):  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"E2BSandbox({name}={value!r}): it must be a number of seconds above 0 and up to {_LONGEST} (a day)."
        )
