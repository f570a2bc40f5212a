"""The handful of Linux calls that Python does not wrap, each raising `OSError` with its own name."""

import ctypes
import os

__all__ = [
    "CLONE_NEWNS",
    "capabilities_drop",
    "die_with_parent",
    "forbid_new_privileges",
    "mount_tmpfs",
    "prctl",
    "set_dumpable",
    "syscall",
    "unshare",
]

CLONE_NEWNS = 0x00020000

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


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
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked("capset", _libc.capset(header, nothing))


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags`."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount_tmpfs(target: str, options: str) -> None:
    """Mount a tmpfs without devices, setuid files or executables."""
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _checked("mount tmpfs", _libc.mount(b"tmpfs", target.encode(), b"tmpfs", flags, options.encode()))


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)
