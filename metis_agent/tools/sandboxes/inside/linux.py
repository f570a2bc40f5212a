"""The Linux calls that contain a process, as steps that are made ahead and taken after the fork; Landlock among them.

Landlock says which files a process may open, for itself and for good, without root. Every right that the kernel's ABI
knows is handled, so what no rule grants is refused: writing and making files outside the own folder, TCP (ABI 4),
signals and abstract sockets that leave the domain (ABI 6). Not mediated by any ABI: `stat`, `chmod`, `chown`, `utime`,
`readlink`; the system-call filter refuses those that change something.
Source: Linux `Documentation/userspace-api/landlock.rst`.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = [
    "CLONE_NEWNS",
    "CLONE_NEWUSER",
    "READ",
    "READ_AND_WRITE",
    "Limit",
    "Ruleset",
    "Step",
    "become",
    "change_folder",
    "die_with_parent",
    "drop_capabilities",
    "forbid_new_privileges",
    "join_pages",
    "keep_mounts_private",
    "keep_own_ids",
    "mount_tmpfs",
    "own_proc",
    "prctl",
    "supported_abi",
    "take",
    "unshare",
]

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_SIGKILL = 9
_HUGE_PAGE, _MADV_COLLAPSE = 1 << 21, 25

_libc = ctypes.CDLL(None, use_errno=True)


class Step(NamedTuple):
    """A call of the C library, its arguments made ahead: a fork that makes them itself copies all that it touches."""

    name: str
    """For the message of the `OSError`."""
    function: Any
    arguments: tuple[Any, ...]


def take(steps: Iterable[Step]) -> None:
    """Make these calls, in this order, up to the first that fails."""
    for name, function, arguments in steps:
        if function(*arguments) < 0:
            raise _error(name)


def syscall(name: str, number: int, *arguments: object) -> Step:
    """A raw system call."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return Step(name, _libc.syscall, (ctypes.c_long(number), *converted))


def prctl(option: int, *values: int) -> Step:
    """`prctl` with up to four values, the rest zero."""
    padded = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    return Step(f"prctl({option})", _libc.prctl, (ctypes.c_int(option), *padded))


def forbid_new_privileges() -> Step:
    """No later exec may gain rights (setuid programs, file capabilities); forks inherit it."""
    return prctl(_PR_SET_NO_NEW_PRIVS, 1)


def own_proc() -> Step:
    """The process owns its own `/proc/self`, which a change of uid took from it."""
    return prctl(_PR_SET_DUMPABLE, 1)


def die_with_parent() -> Step:
    """SIGKILL this process when its parent (a single-threaded process) ends, if it has not ended before.

    After the last change of uid, which clears the setting.
    """
    return prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def drop_capabilities() -> Step:
    """Give up every capability for good; also those that uid 0 brings."""
    return Step("capset", _libc.capset, (struct.pack("=II", _CAPABILITY_VERSION_3, 0), bytes(6 * 4)))


def unshare(flags: int) -> Step:
    """Leave the namespaces named by `flags`."""
    return Step("unshare", _libc.unshare, (ctypes.c_int(flags),))


def change_folder(path: ctypes.c_char_p) -> Step:
    """Work in this folder."""
    return Step("chdir", _libc.chdir, (path,))


def become(uid: ctypes.c_uint) -> list[Step]:
    """Take this uid, and a gid of the same number, and no others."""
    ids = (uid, uid, uid)
    return [
        Step("setgroups", _libc.setgroups, (ctypes.c_size_t(0), None)),
        Step("setresgid", _libc.setresgid, ids),
        Step("setresuid", _libc.setresuid, ids),
    ]


class Limit(ctypes.Structure):
    """A limit, the soft one and the hard one the same.

    Args:
        kind: of resource, by its number in the module of that name.
        most: this process's hard limit, which few may raise.
    """

    _fields_ = (("soft", ctypes.c_ulong), ("hard", ctypes.c_ulong))

    def __init__(self, kind: int, most: int) -> None:
        super().__init__()
        self._most = most
        self.step = Step(f"setrlimit({kind})", _libc.setrlimit, (ctypes.c_int(kind), ctypes.byref(self)))

    def hold(self, value: int) -> None:
        """Choose what the step will set."""
        self.soft = self.hard = min(value, self._most)


def keep_mounts_private() -> Step:
    """What this process mounts stays in its own mount namespace."""
    flags = ctypes.c_ulong(_MS_REC | _MS_PRIVATE)
    return Step("mount --make-rprivate", _libc.mount, (None, b"/", None, flags, None))


def mount_tmpfs(target: str, options: ctypes.c_char_p) -> Step:
    """Mount a tmpfs without devices, setuid files or executables."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    return Step("mount tmpfs", _libc.mount, (b"tmpfs", os.fsencode(target), b"tmpfs", flags, options))


def keep_own_ids(uid: int, gid: int) -> None:
    """In a fresh user namespace: the ids are what they were, and there are no others."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def join_pages(first: int, last: int) -> None:
    """Put the heap, and what lies between two addresses, into huge pages, so that a fork copies one entry and not 512.

    What can't be joined stays as it is: all of it before Linux 6.1.
    """
    _libc.sbrk.restype = ctypes.c_void_p
    place = int(_libc.sbrk(0) or 0) // _HUGE_PAGE * _HUGE_PAGE - _HUGE_PAGE
    while _joined(place):
        place -= _HUGE_PAGE
    for place in range(first // _HUGE_PAGE * _HUGE_PAGE, last, _HUGE_PAGE):
        _joined(place)


def _joined(place: int) -> bool:
    return bool(_libc.madvise(ctypes.c_void_p(place), ctypes.c_size_t(_HUGE_PAGE), _MADV_COLLAPSE) == 0)


def _error(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")


_CREATE, _ADD, _RESTRICT = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << n for n in range(6))
_MAKE_DIR, _MAKE_REG = 1 << 7, 1 << 8
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many file rights, counted from bit 0, each ABI handles; from 5 on, 16."""

READ = _READ_FILE | _READ_DIR
"""Open for reading, and list."""
READ_AND_WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
"""Also write, truncate, make, rename and remove; files and folders only, no links, sockets or devices."""


def supported_abi() -> int:
    """The kernel's Landlock ABI; 0 where it has none, or has it switched off."""
    _, function, arguments = syscall("", _CREATE, ctypes.c_void_p(None), 0, _VERSION_FLAG)
    return max(0, int(function(*arguments)))


class Ruleset:
    """What a process may open, and nothing else; put together once, for any number of processes.

    Args:
        abi: the kernel's Landlock ABI.
        grants: descriptors of files, and of folders for all beneath them, with the rights on each. They stay open.
    """

    def __init__(self, abi: int, grants: Iterable[tuple[int, int]]) -> None:
        handled = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
        network, scopes = 0b11, 0b11
        attribute = struct.pack("=QQQ", handled, network, scopes)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        self._fd = ctypes.c_long()
        self._own = _Rule(READ_AND_WRITE & handled)
        rules = [_Rule(rights & handled & _rights_on(fd), fd) for fd, rights in grants]
        self._create = syscall("landlock_create_ruleset", _CREATE, attribute[:size], size, 0)
        self._add = [
            syscall("landlock_add_rule", _ADD, self._fd, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
            for rule in (*rules, self._own)
        ]
        self.restrict = syscall("landlock_restrict_self", _RESTRICT, self._fd, 0)
        """Put the rules on this thread and its children; needs `forbid_new_privileges` first."""

    def begin(self, folder: str) -> tuple[int, int]:
        """Make the rules of a process that may also write in a folder of its own; the descriptors are open."""
        name, function, arguments = self._create
        self._fd.value = function(*arguments)
        if self._fd.value < 0:
            raise _error(name)
        self._own.fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        take(self._add)
        return self._fd.value, self._own.fd


def _rights_on(fd: int) -> int:
    return -1 if stat.S_ISDIR(os.fstat(fd).st_mode) else _FILE_RIGHTS


class _Rule(ctypes.Structure):
    _pack_, _layout_ = 1, "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("fd", ctypes.c_int))
