"""Closes every door on a freshly forked session, in the one order that works.

Own folder, memory and file limits, another uid, no capabilities, Landlock, death with the parent, and last
the system-call filter, which refuses everything that the earlier steps needed.
"""

import os
import resource
from collections.abc import Mapping, Sequence
from typing import Any

from . import linux
from .seccomp import Filter

__all__ = ["Containment"]

_OPEN_FILES = 64
_FILES_PER_MB = 64
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Containment:
    """What is the same for all sessions of a template, prepared once; `enter` is then a few calls.

    Args:
        settings: from the host: `own_mount` (each session mounts its own tmpfs on `folder`), `folder`,
            `readable`, `landlock_abi` (0: the kernel has none).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._own_mount = bool(settings["own_mount"])
        self._folder = str(settings["folder"])
        self._abi = int(settings["landlock_abi"])
        self._filter = Filter()
        self._template = os.getpid()
        paths = [path for path in (*settings["readable"], *_DEVICES) if os.path.exists(path)]
        self._readable = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths] if self._abi else []

    def enter(self, request: Mapping[str, Any], uid: int | None) -> None:
        """Contain this process for good.

        Args:
            request: from the host: `folder`, `memory` (bytes of address space), `disk` (bytes), `threads`.
            uid: the session's own uid and gid, or `None` to keep the template's.

        Raises:
            OSError: a step failed; the process must end, as it is not contained.
        """
        folder = self._make_folder(request, uid)
        rules = self._rules(folder) if self._abi else None
        _limit(request, separate_uid=uid is not None)
        if uid is not None:
            os.setgroups(())
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        linux.capabilities_drop()
        # As the owner: a template with few capabilities may not enter the folder of another uid.
        os.chdir(folder)
        # The change of uid took away its own /proc/self, through which late imports may go.
        linux.set_dumpable(True)
        linux.forbid_new_privileges()
        if rules is not None:
            rules.restrict_self()
        linux.die_with_parent(self._template)
        self._filter.install(os.getpid())

    def _make_folder(self, request: Mapping[str, Any], uid: int | None) -> str:
        owner = os.getuid() if uid is None else uid
        if self._own_mount:
            folder, megabytes = self._folder, max(1, request["disk"] >> 20)
            linux.unshare(linux.CLONE_NEWNS)
            options = f"size={request['disk']},nr_inodes={megabytes * _FILES_PER_MB},mode=0700,uid={owner},gid={owner}"
            linux.mount_tmpfs(folder, options)
        else:
            folder = os.path.join(self._folder, request["folder"])
            os.mkdir(folder, 0o700)
            if uid is not None:
                os.chown(folder, uid, uid)
        for name in ("HOME", "TMPDIR"):
            os.environ[name] = folder
        return folder

    def _rules(self, folder: str) -> linux.Ruleset:
        rules = linux.Ruleset(self._abi)
        for fd in self._readable:
            rules.grant(fd, linux.READ)
        null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
        own = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rules.grant(null, linux.READ_AND_WRITE)
        rules.grant(own, linux.READ_AND_WRITE)
        os.close(null)
        os.close(own)
        return rules


def _limit(request: Mapping[str, Any], *, separate_uid: bool) -> None:
    limits: Sequence[tuple[int, int]] = (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, request["disk"]),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        # Counted by uid: exact where the session has its own, a backstop where it shares the user's.
        (resource.RLIMIT_NPROC, request["threads"] if separate_uid else request["tasks"]),
    )
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
