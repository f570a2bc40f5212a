"""Code in a plain subprocess: **not a sandbox**. It can read and change all that the user can.

For machines where nothing contains code and its author is trusted. It has the timeout, the output cap and
the session of the real backends, and a process of its own, so a crash stays there. Behind an explicit flag,
and it warns.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings

from metis_agent.errors import ConfigurationError, SandboxGoneError
from metis_agent.tools.sandboxes.base import Closing, SandboxLimits
from metis_agent.tools.sandboxes.inside.paths import remove_folder
from metis_agent.tools.sandboxes.inside.wire import screen_size
from metis_agent.tools.sandboxes.machine import bare_environment, inside_folder, interpreter, site_folders
from metis_agent.tools.sandboxes.process import PopenHandle, SessionProcess, answer_limits
from metis_agent.tools.sandboxes.session import LocalSession

__all__ = ["UnsafeSandbox", "UnsafeSandboxWarning"]

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
