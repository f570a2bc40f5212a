"""Closes every door on a freshly forked session, in the one order that works.

Own folder, another uid or user namespace, limits, no capabilities, Landlock, death with the parent, and last the
system-call filter, which refuses everything that the earlier steps needed.
"""

import os
import resource
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import linux
from .seccomp import Filter

__all__ = ["Containment"]

_OPEN_FILES = 64
_FILES_PER_MB = 64
_MB = 1 << 20
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Containment:
    """What is the same for all sessions of a template, prepared once; `enter` is then a few calls.

    Args:
        settings: from the host: `folder`, `readable`, `uids`, `landlock_abi` (0: the kernel has none), `boxed`
            (this process is in namespaces of its own, in which it may mount), `namespaces` (where it is not: make
            some for each session, if the kernel lets this user).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._boxed = bool(settings["boxed"])
        self._own_uids = bool(settings["uids"])
        self._folder = str(settings["folder"])
        self._abi = int(settings["landlock_abi"])
        self._filter = Filter()
        linux.look_up()
        self._template = os.getpid()
        paths = [path for path in (*settings["readable"], *_DEVICES) if os.path.exists(path)]
        opened = [os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths] if self._abi else []
        self._grants = [linux.Grant(fd, linux.READ, self._abi) for fd in opened]
        if self._abi:
            null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
            self._grants.append(linux.Grant(null, linux.READ_AND_WRITE, self._abi))
        tried = bool(settings["namespaces"])
        self.own_mount = self._boxed or (tried and _works(lambda: self._mount(_MB)))
        """The kernel holds the limit of a session's files: they are in a tmpfs of its own."""
        self.own_count = self._own_uids or (tried and _works(self._count_alone))
        """The kernel holds the limit of a session's threads: no others count with them."""
        if self.own_mount:
            _be_at_home(self._folder)

    def rules(self) -> linux.Ruleset | None:
        """Of a session to be forked, all but what it may do in its own folder; made here, it costs the fork nothing."""
        if not self._abi:
            return None
        rules = linux.Ruleset(self._abi)
        for grant in self._grants:
            rules.add(grant)
        return rules

    def enter(self, request: Mapping[str, Any], uid: int | None, rules: linux.Ruleset | None) -> None:
        """Contain this process for good.

        Args:
            request: from the host: `folder`, `memory` (bytes of address space), `disk` (bytes), `threads`.
            uid: the session's own uid and gid, or `None` to keep the template's.
            rules: of this session alone; see there.

        Raises:
            OSError: a step failed; the process must end, as it is not contained.
        """
        folder = self._make_folder(request, uid)
        if rules is not None:
            own = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            rules.add(linux.Grant(own, linux.READ_AND_WRITE, self._abi))
            os.close(own)
        if uid is not None:
            os.setgroups(())
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        elif self.own_count and (self._boxed or not self.own_mount):
            # Else the mount came with one.
            linux.unshare(linux.CLONE_NEWUSER)
        _limit(request, counted_alone=self.own_count)
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
        if self.own_mount:
            folder = self._folder
            self._mount(request["disk"], uid)
        else:
            folder = os.path.join(self._folder, request["folder"])
            os.mkdir(folder, 0o700)
            if uid is not None:
                os.chown(folder, uid, uid)
            _be_at_home(folder)
        return folder

    def _mount(self, size: int, uid: int | None = None) -> None:
        """A tmpfs on the folder, that nothing but this process sees."""
        owner = os.getuid() if uid is None else uid
        if not self._boxed and not self._own_uids:
            ids = os.getuid(), os.getgid()
            linux.unshare(linux.CLONE_NEWUSER)
            linux.keep_own_ids(*ids)
        linux.unshare(linux.CLONE_NEWNS)
        if not self._boxed:
            linux.keep_mounts_private()
        inodes = max(1, size // _MB) * _FILES_PER_MB
        linux.mount_tmpfs(self._folder, f"size={size},nr_inodes={inodes},mode=0700,uid={owner},gid={owner}")

    def _count_alone(self) -> None:
        """Try whether in a user namespace RLIMIT_NPROC counts this process's threads and no others (Linux 5.14).

        Its ids stay without a name in it: what they may do is decided by what they are outside.
        """
        linux.unshare(linux.CLONE_NEWUSER)
        resource.setrlimit(resource.RLIMIT_NPROC, (2, 2))
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()


def _be_at_home(folder: str) -> None:
    for name in ("HOME", "TMPDIR"):
        os.environ[name] = folder


def _works(attempt: Callable[[], None]) -> bool:
    """Whether it can be done here: tried in a fork."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _limit(request: Mapping[str, Any], *, counted_alone: bool) -> None:
    limits: Sequence[tuple[int, int]] = (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, request["disk"]),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        # Counted by uid and user namespace: exact where the session has its own, a backstop where it shares them.
        (resource.RLIMIT_NPROC, request["threads"] if counted_alone else request["tasks"]),
    )
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
