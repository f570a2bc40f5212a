"""Landlock: which files a process may open, for itself and for good, without root.

Every right that the kernel's ABI knows is handled, so what no rule grants is refused: writing and making
files outside the own folder, TCP (ABI 4), signals and abstract sockets that leave the domain (ABI 6).
Not mediated by any ABI: `stat`, `chmod`, `chown`, `utime`, `readlink`; the system-call filter refuses
those that change something. Source: Linux `Documentation/userspace-api/landlock.rst`.
"""

import ctypes
import os
import stat
import struct

from .linux import syscall

__all__ = ["READ", "READ_AND_WRITE", "Ruleset", "supported_abi"]

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


class Ruleset:
    """Grants, collected and then put on this process; everything not granted is refused."""

    def __init__(self, abi: int) -> None:
        self._handled = (1 << _RIGHTS_BY_ABI.get(abi, 16)) - 1
        network, scopes = 0b11, 0b11
        attribute = struct.pack("=QQQ", self._handled, network, scopes)
        size = 24 if abi >= 6 else 16 if abi >= 4 else 8
        pointer = ctypes.create_string_buffer(attribute[:size], size)
        self._fd = syscall("landlock_create_ruleset", _CREATE, ctypes.byref(pointer), size, 0)

    def grant(self, fd: int, rights: int) -> None:
        """Grant `rights` on the file, or on the folder and all beneath it, that `fd` is open on."""
        rights &= self._handled
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        pointer = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        syscall("landlock_add_rule", _ADD, self._fd, _RULE_PATH_BENEATH, ctypes.byref(pointer), 0)

    def restrict_self(self) -> None:
        """Put the rules on this thread and its children; needs `forbid_new_privileges` first."""
        syscall("landlock_restrict_self", _RESTRICT, self._fd, 0)
        os.close(self._fd)
