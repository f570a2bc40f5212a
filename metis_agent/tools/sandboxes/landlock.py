"""Sessions contained by Landlock and seccomp: without root, and without anything to install.

Contained: reading and writing outside the session's own folder (but for the interpreter's library, installed
packages, shared libraries and fonts, which it may read), the network, other processes (signals, ptrace,
memory), new processes and programs, memory, time, output, threads.

Disk and threads. Where the kernel lets this user make namespaces, a session's folder is a tmpfs of its own and its
threads are counted alone, so that the kernel holds both limits; its files then count as memory of the machine. Where
not (many containers), the size of one file is held by the kernel, and the host counts the sum, deleted files that are
still open or mapped included, and the threads of an ordinary user: every 50 ms at most, sooner as the limit comes
nearer, the process standing still. A session over its limit is killed, and can exceed it by what it takes in that time.

Not contained: metadata. Code can learn whether a path exists, its size and its times (`stat`), where the file
permissions of its uid allow that.

Needs Linux 5.13 or newer with Landlock switched on. Each ABI below 6 lacks something (truncation before 3,
TCP before 4, signals before 6); the system-call filter refuses those in any case.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable

from metis_agent.errors import SandboxUnavailableError
from metis_agent.tools.sandboxes.base import SandboxLimits
from metis_agent.tools.sandboxes.inside.linux import supported_abi
from metis_agent.tools.sandboxes.inside.paths import everyone_may_enter, remove_folder
from metis_agent.tools.sandboxes.template import DEFAULT_PACKAGES, TemplatePlan, WarmSandbox

__all__ = ["LandlockSandbox"]

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
