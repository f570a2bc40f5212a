"""Closes every door on a freshly forked session, in the one order that works.

Own folder, another uid or user namespace, limits, no capabilities, Landlock, death with the parent, and last the
system-call filter, which refuses everything that the earlier steps needed.
"""

import ctypes
import fcntl
import os
import resource
import threading
from collections.abc import Callable, Mapping
from typing import Any

from . import linux
from .paths import REHEARSALS
from .seccomp import Filter
from .wire import Terms

__all__ = ["Containment"]

_OPEN_FILES = 64
_FILES_PER_MB = 64
_MB = 1 << 20
_PR_GET_NAME = 16
_NO_LIMIT = (1 << 64) - 1
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Containment:
    """What is the same for all sessions of a template, prepared once; `enter` is then a few calls.

    It limits the template as well, in what that has no use for: new privileges, core dumps, locked memory.

    Args:
        settings: from the host: `folder`, `readable`, `uids`, `landlock_abi` (0: the kernel has none), `boxed`
            (this process is in namespaces of its own, in which it may mount), `namespaces` (where it is not: make
            some for each session, if the kernel lets this user).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._boxed = bool(settings["boxed"])
        self._own_uids = bool(settings["uids"])
        self._folder = str(settings["folder"])
        self._template, self._owner = os.getpid(), os.getuid()
        self._filter = Filter()
        # What the steps read when they are taken.
        self._uid, self._options, self._place = ctypes.c_uint(), ctypes.c_char_p(), ctypes.c_char_p()
        kinds = (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
        self._memory, self._disk, self._threads, self._files = map(_limit, kinds)
        tried = bool(settings["namespaces"])
        self._mount = [linux.unshare(linux.CLONE_NEWNS)]
        if not self._boxed:
            self._mount.append(linux.keep_mounts_private())
        self._mount.append(linux.mount_tmpfs(self._folder, self._options))
        self.own_mount = self._boxed or (tried and _works(lambda: self._make_mount(_MB)))
        """The kernel holds the limit of a session's files: they are in a tmpfs of its own."""
        self.own_count = self._own_uids or (tried and _works(_count_alone))
        """The kernel holds the limit of a session's threads: no others count with them."""
        self._rules = _rules(settings)
        self._steps = self._last_steps()
        for kind in (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK):
            resource.setrlimit(kind, (0, 0))
        linux.take([linux.forbid_new_privileges()])

    def rehearse(self) -> None:
        """Do what of `enter` can be done here: what the interpreter looks up for it, it need not in each fork."""
        if self.own_mount:
            _be_at_home(self._folder)
        name = ctypes.create_string_buffer(16)
        for _ in range(REHEARSALS):
            self._hold(Terms(0, 0, 0, 0, 0, 0, 0), self._folder)
            self._hold_mount(0)
            linux.take([linux.prctl(_PR_GET_NAME, ctypes.addressof(name))])
            if self._rules is not None:
                for fd in self._rules.begin(self._folder):
                    os.close(fd)
            self._filter.program(self._template)

    def enter(self, terms: Terms, name: str, uid: int | None) -> None:
        """Contain this process for good.

        Args:
            terms: from the host.
            name: of its folder, where that is no mount of its own.
            uid: the session's own uid and gid, or `None` to keep the template's.

        Raises:
            OSError: a step failed; the process must end, as it is not contained.
        """
        if uid is not None:
            self._uid.value = self._owner = uid
        folder = self._make_folder(terms.disk, name)
        if self._rules is not None:
            self._rules.begin(folder)
        self._hold(terms, folder)
        linux.take(self._steps)
        if os.getppid() != self._template:
            # It went before its end would have been this one's.
            os._exit(0)
        self._filter.install(os.getpid())

    def _hold(self, terms: Terms, folder: str) -> None:
        self._place.value = os.fsencode(folder)
        self._memory.hold(terms.memory)
        self._disk.hold(terms.disk)
        # Counted by uid and user namespace: exact where the session has its own, a backstop where it shares them.
        self._threads.hold(terms.threads if self.own_count else terms.tasks)

    def _hold_mount(self, size: int) -> None:
        inodes = max(1, size // _MB) * _FILES_PER_MB
        owner = self._owner
        self._options.value = f"size={size},nr_inodes={inodes},mode=0700,uid={owner},gid={owner}".encode()

    def _last_steps(self) -> list[linux.Step]:
        """From the folder, which is made, to the system-call filter."""
        steps: list[linux.Step] = []
        if self._own_uids:
            steps += linux.become(self._uid)
        elif self.own_count and (self._boxed or not self.own_mount):
            # Else the mount came with one.
            steps.append(linux.unshare(linux.CLONE_NEWUSER))
        self._files.hold(_OPEN_FILES)
        steps += [
            *(limit.step for limit in (self._memory, self._disk, self._threads, self._files)),
            linux.drop_capabilities(),
            # As the owner: a template with few capabilities may not enter the folder of another uid.
            linux.change_folder(self._place),
            # The change of uid took away its own /proc/self, through which late imports may go.
            linux.own_proc(),
        ]
        if self._rules is not None:
            steps.append(self._rules.restrict)
        return [*steps, linux.die_with_parent()]

    def _make_folder(self, size: int, name: str) -> str:
        if self.own_mount:
            self._make_mount(size)
            return self._folder
        folder = os.path.join(self._folder, name)
        os.mkdir(folder, 0o700)
        if self._own_uids:
            os.chown(folder, self._owner, self._owner)
        _be_at_home(folder)
        return folder

    def _make_mount(self, size: int) -> None:
        """A tmpfs on the folder, that nothing but this process sees."""
        if not self._boxed and not self._own_uids:
            ids = os.getuid(), os.getgid()
            linux.take([linux.unshare(linux.CLONE_NEWUSER)])
            linux.keep_own_ids(*ids)
        self._hold_mount(size)
        linux.take(self._mount)


def _limit(kind: int) -> linux.Limit:
    hard = resource.getrlimit(kind)[1]
    return linux.Limit(kind, _NO_LIMIT if hard == resource.RLIM_INFINITY else hard)


def _rules(settings: Mapping[str, Any]) -> linux.Ruleset | None:
    abi = int(settings["landlock_abi"])
    if not abi:
        return None
    paths = [path for path in (*settings["readable"], *_DEVICES) if os.path.exists(path)]
    grants = [(_opened(path), linux.READ) for path in paths]
    return linux.Ruleset(abi, [*grants, (_opened("/dev/null"), linux.READ_AND_WRITE)])


def _opened(path: str) -> int:
    fd = os.open(path, os.O_PATH)
    try:
        # Low numbers are kept for what sessions keep.
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _OPEN_FILES)
    finally:
        os.close(fd)


def _count_alone() -> None:
    """Try whether in a user namespace RLIMIT_NPROC counts this process's threads and no others (Linux 5.14).

    Its ids stay without a name in it: what they may do is decided by what they are outside.
    """
    linux.take([linux.unshare(linux.CLONE_NEWUSER)])
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
