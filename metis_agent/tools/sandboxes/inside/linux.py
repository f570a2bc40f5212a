"""The handful of Linux calls that Python does not wrap, each raising `OSError` with its own name; Landlock among them.

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

__all__ = [
    "CLONE_NEWNS",
    "CLONE_NEWUSER",
    "READ",
    "READ_AND_WRITE",
    "Grant",
    "Ruleset",
    "capabilities_drop",
    "die_with_parent",
    "forbid_new_privileges",
    "join_pages",
    "keep_mounts_private",
    "keep_own_ids",
    "look_up",
    "mount_tmpfs",
    "prctl",
    "set_dumpable",
    "supported_abi",
    "syscall",
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


def look_up() -> None:
    """Find what a session will call: a fork that has to search copies all that it touches."""
    for name in ("capset", "mount", "prctl", "unshare"):
        getattr(_libc, name)


def syscall(name: str, number: int, *arguments: object) -> int:
    """A raw system call; `name` is only for the message of the `OSError`."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *converted))


def prctl(option: int, *values: int) -> None:
    """`prctl` with up to four values, the rest zero."""
    padded = [ctypes.c_ulong(v) for v in (*values, 0, 0, 0, 0)[:4]]
    _checked(f"prctl({option})", _libc.prctl(ctypes.c_int(option), *padded))


def forbid_new_privileges() -> None:
    """No later exec may gain rights (setuid programs, file capabilities)."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(on: bool) -> None:
    """Whether the process owns its own `/proc/self`; a change of uid clears it."""
    prctl(_PR_SET_DUMPABLE, int(on))


def die_with_parent(parent: int) -> None:
    """SIGKILL this process when its parent (a single-threaded process) ends.

    Call it after the last change of uid, which clears the setting.
    """
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        # The parent went before the setting took hold.
        os._exit(0)


def capabilities_drop() -> None:
    """Give up every capability for good; also those that uid 0 brings."""
    _checked("capset", _libc.capset(struct.pack("=II", _CAPABILITY_VERSION_3, 0), bytes(6 * 4)))


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags`."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def keep_mounts_private() -> None:
    """What this process mounts stays in its own mount namespace."""
    flags = ctypes.c_ulong(_MS_REC | _MS_PRIVATE)
    _checked("mount --make-rprivate", _libc.mount(None, b"/", None, flags, None))


def keep_own_ids(uid: int, gid: int) -> None:
    """In a fresh user namespace: the ids are what they were, and there are no others."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_tmpfs(target: str, options: str) -> None:
    """Mount a tmpfs without devices, setuid files or executables."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _checked("mount tmpfs", _libc.mount(b"tmpfs", target.encode(), b"tmpfs", flags, options.encode()))


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


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


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
    try:
        return syscall("landlock_create_ruleset", _CREATE, ctypes.c_void_p(None), 0, _VERSION_FLAG)
    except OSError:
        return 0


def _handled(abi: int) -> int:
    return (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1


class Grant:
    """Rights on the file, or on the folder and all beneath it, that `fd` is open on; for any number of rulesets."""

    def __init__(self, fd: int, rights: int, abi: int) -> None:
        rights &= _handled(abi)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        self.rule = struct.pack("=Qi", rights, fd)


class Ruleset:
    """Grants, collected and then put on this process; everything not granted is refused."""

    def __init__(self, abi: int) -> None:
        network, scopes = 0b11, 0b11
        attribute = struct.pack("=QQQ", _handled(abi), network, scopes)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        self._fd = syscall("landlock_create_ruleset", _CREATE, attribute[:size], size, 0)

    def add(self, grant: Grant) -> None:
        """What is granted; `grant`'s descriptor is still open."""
        syscall("landlock_add_rule", _ADD, self._fd, _RULE_PATH_BENEATH, grant.rule, 0)

    def restrict_self(self) -> None:
        """Put the rules on this thread and its children; needs `forbid_new_privileges` first."""
        syscall("landlock_restrict_self", _RESTRICT, self._fd, 0)
        self.close()

    def close(self) -> None:
        """Free its descriptor in this process."""
        os.close(self._fd)
