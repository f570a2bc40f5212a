"""The system-call filter: the tables of `syscalls`, assembled into classic BPF and installed.

Each entry is a self-contained block that ends in a return, so no jump is longer than its block.
Source: Linux `Documentation/userspace-api/seccomp_filter.rst`.
"""

import ctypes
import errno
import platform
import struct

from .linux import prctl
from .syscalls import ABSENT, ALLOWED, FIRST_UNKNOWN, NUMBERS, OWN_PROCESS_ONLY, RULES, Rule

__all__ = ["Filter"]

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_MISSING = 0x00050000 | errno.ENOSYS

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


class Filter:
    """The filter for one processor, assembled once; only the caller's process id differs by session.

    Raises:
        OSError: the processor has no table (x86_64 and aarch64 have one).
    """

    def __init__(self, machine: str | None = None) -> None:
        machine = machine or platform.machine()
        if machine not in NUMBERS:
            raise OSError(errno.ENOSYS, f"no seccomp table for the processor {machine!r}")
        self._numbers = NUMBERS[machine]
        self._head = b"".join((*_prologue(_AUDIT_ARCHITECTURE[machine]), *self._fixed_blocks()))

    def program(self, process: int) -> bytes:
        """The assembled filter, 8 bytes an instruction, for the process with this id."""
        own = b"".join(self._rule(Rule(name, 0, (process,))) for name in OWN_PROCESS_ONLY)
        return self._head + own + _instruction(_RETURN, _REFUSE)

    def install(self, process: int) -> None:
        """Filter this process from now on; it can't be undone. Needs `forbid_new_privileges` first."""
        program = self.program(process)
        code = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
        prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(header))

    def _fixed_blocks(self) -> list[bytes]:
        blocks = [self._answer(name, _ALLOW) for name in ALLOWED]
        blocks += [self._answer(name, _MISSING) for name in ABSENT]
        blocks += [self._rule(rule) for rule in RULES]
        return blocks

    def _answer(self, name: str, action: int) -> bytes:
        number = self._numbers.get(name)
        if number is None:
            return b""
        return _instruction(_IF_EQUAL, number, 0, 1) + _instruction(_RETURN, action)

    def _rule(self, rule: Rule) -> bytes:
        number = self._numbers.get(rule.name)
        if number is None:
            return b""
        matched, otherwise = (_REFUSE, _ALLOW) if rule.deny else (_ALLOW, _REFUSE)
        block = _instruction(_LOAD, _OFFSET_ARGUMENTS + 8 * rule.argument) + _instruction(_AND, rule.mask)
        for value in rule.values:
            block += _instruction(_IF_EQUAL, value, 0, 1) + _instruction(_RETURN, matched)
        block += _instruction(_RETURN, otherwise)
        return _instruction(_IF_EQUAL, number, 0, len(block) // 8) + block


def _prologue(architecture: int) -> list[bytes]:
    return [
        _instruction(_LOAD, _OFFSET_ARCHITECTURE),
        # Another ABI of the same processor (32-bit calls) numbers its calls differently.
        _instruction(_IF_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _OFFSET_NUMBER),
        _instruction(_IF_AT_LEAST, FIRST_UNKNOWN, 0, 1),
        _instruction(_RETURN, _MISSING),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
