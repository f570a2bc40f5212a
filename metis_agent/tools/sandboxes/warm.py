"""A sandbox whose sessions are forked from a warm template; the base of the local backends."""

from __future__ import annotations

import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterable

from metis_agent.errors import SandboxGoneError
from metis_agent.tools.sandboxes.closing import Closing
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.machine import readable_paths, site_folders, spare_uids
from metis_agent.tools.sandboxes.process import SessionProcess
from metis_agent.tools.sandboxes.session import LocalSession
from metis_agent.tools.sandboxes.template import PATIENCE_SECONDS, Template, TemplatePlan

__all__ = ["DEFAULT_PACKAGES", "WarmSandbox"]

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

    def _settings(self, *, landlock_abi: int) -> dict[str, object]:
        return {
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
