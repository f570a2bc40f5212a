"""Sessions inside bubblewrap's namespaces, with Landlock (where the kernel has it) and seccomp on top.

The template runs in namespaces of its own: a read-only file system that holds the interpreter's library,
installed packages, shared libraries and fonts, and nothing else; no network; no other processes; no /proc.
Each session then gets its own mount namespace with a tmpfs of limited size as `/tmp`, its work folder, so
that the kernel holds the disk limit and other paths do not even exist. Its files count as memory of the
machine, beyond the session's memory limit.

Works as root and, where the kernel allows user namespaces, as an ordinary user. The session's rights to mount
are given up before any code runs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from metis_agent.errors import SandboxUnavailableError
from metis_agent.tools.sandboxes.base import SandboxLimits
from metis_agent.tools.sandboxes.inside.linux import supported_abi
from metis_agent.tools.sandboxes.machine import inside_folder, interpreter, readable_paths
from metis_agent.tools.sandboxes.template import DEFAULT_PACKAGES, TemplatePlan, WarmSandbox

__all__ = ["BubblewrapSandbox"]

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
    arguments += ["--tmpfs", work]
    if own_uids:
        # Folders that bubblewrap makes on the way to a bound one are otherwise closed to other uids.
        for folder in sorted({str(parent) for path in bound for parent in PurePath(path).parents} - {"/"}):
            arguments += ["--perms", "0755", "--dir", folder]
    for path in bound:
        arguments += ["--ro-bind", path, path]
    for device in _DEVICES:
        arguments += ["--dev-bind", device, device]
    return [*arguments, "--remount-ro", "/", "--chdir", "/", "--"]
