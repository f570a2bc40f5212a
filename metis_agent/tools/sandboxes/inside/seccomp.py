"""The system-call filter: which calls the code in a sandbox may make, assembled into classic BPF and installed.

An allow list: what is not named here fails with EPERM. Not named, on purpose: every way to make a process or run a
program, to open a socket, to change modes, owners, times or limits of something else, to trace, to share or hide memory
(memfd, System V, userfaultfd), to pass descriptors (a file on its way is in no folder and at no process), to mount, and
everything that takes a pidfd. Each entry is a self-contained block that
ends in a return, so no jump is longer than its block. Sources: Linux `Documentation/userspace-api/seccomp_filter.rst`;
numbers of `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Iterable
from typing import NamedTuple

from .linux import prctl, take

__all__ = ["ABSENT", "ALLOWED", "FIRST_UNKNOWN", "NUMBERS", "OWN_PROCESS_ONLY", "RULES", "Filter", "Rule"]

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS = 0, 4, 16

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_MISSING = 0x00050000 | errno.ENOSYS

_VALUE_OF_FIRST_CHECK = 3 * 8 + 4
"""In a rule: behind the call's number, a load and a mask stands the comparison, whose last half is the value."""

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_WORD = struct.Struct("=I")


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
        head = b"".join((*_prologue(_AUDIT_ARCHITECTURE[machine]), *self._fixed_blocks()))
        own = [self._rule(Rule(name, (Check(0, (0,)),))) for name in OWN_PROCESS_ONLY]
        program = head + b"".join(own) + _instruction(_RETURN, _REFUSE)
        self._code = ctypes.create_string_buffer(program, len(program))
        self._header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(self._code)))
        self._steps = [prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(self._header))]
        self._process_at = [len(head) + place * len(own[0]) + _VALUE_OF_FIRST_CHECK for place in range(len(own))]

    def program(self, process: int) -> bytes:
        """The assembled filter, 8 bytes an instruction, for the process with this id."""
        self._aim(process)
        return self._code.raw

    def install(self, process: int) -> None:
        """Filter this process from now on; it can't be undone. Needs `forbid_new_privileges` first."""
        self._aim(process)
        take(self._steps)

    def _aim(self, process: int) -> None:
        for place in self._process_at:
            _WORD.pack_into(self._code, place, process)

    def _fixed_blocks(self) -> list[bytes]:
        blocks = [
            _allowed(first, last) for first, last in _runs(self._numbers[n] for n in ALLOWED if n in self._numbers)
        ]
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
        block = b"".join(map(_checked, rule.checks)) + _instruction(_RETURN, _ALLOW)
        return _instruction(_IF_EQUAL, number, 0, len(block) // 8) + block


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The first and the last of each run of numbers without a gap; the kernel translates a filter for each session."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        first = runs.pop()[0] if runs and runs[-1][1] == number - 1 else number
        runs.append((first, number))
    return runs


def _allowed(first: int, last: int) -> bytes:
    checks = _instruction(_IF_AT_LEAST, first, 0, 2) + _instruction(_IF_AT_LEAST, last + 1, 1, 0)
    return (checks if first < last else _instruction(_IF_EQUAL, first, 0, 1)) + _instruction(_RETURN, _ALLOW)


def _checked(check: Check) -> bytes:
    """Refuses, or goes on behind itself."""
    word = _OFFSET_ARGUMENTS + 8 * check.argument + 4 * check.high
    block = _instruction(_LOAD, word) + _instruction(_AND, check.mask)
    for left, value in zip(range(len(check.values), 0, -1), check.values, strict=True):
        if check.deny:
            block += _instruction(_IF_EQUAL, value, 0, 1) + _instruction(_RETURN, _REFUSE)
        else:
            block += _instruction(_IF_EQUAL, value, left, 0)
    return block if check.deny else block + _instruction(_RETURN, _REFUSE)


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


class Check(NamedTuple):
    """Looks at one argument: its masked low (or `high`) 32 bits must be one of the values, or with `deny` none."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    deny: bool = False
    high: bool = False


class Rule(NamedTuple):
    """A call that is allowed where its arguments pass every check."""

    name: str
    checks: tuple[Check, ...]


# VM, FS, FILES, SIGHAND and THREAD: a thread of this process, which shares its descriptors with the others.
_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000
_NEW_NAMESPACE = 0x7E020000
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_TRUNCATES_UNWRITTEN = (_O_TRUNC, _O_TRUNC | _O_ACCMODE)
_TYPE_OF_SOCKET = 0xF
_AF_UNIX, _SOCK_STREAM = 1, 1

RULES = (
    # Threads, but no processes: nothing outlives the session, and its memory limit is the limit of all.
    Rule("clone", (Check(0, (_THREAD,), mask=_THREAD | _NEW_NAMESPACE),)),
    # Not CLOSE_RANGE_UNSHARE: in a table of descriptors of its own a thread could keep files that no one sees.
    Rule("close_range", (Check(2, (0, 4)),)),
    # A truncating open that asks for no write access passes Landlock before ABI 3.
    Rule("open", (Check(1, _TRUNCATES_UNWRITTEN, mask=_O_ACCMODE | _O_TRUNC, deny=True),)),
    Rule("openat", (Check(2, _TRUNCATES_UNWRITTEN, mask=_O_ACCMODE | _O_TRUNC, deny=True),)),
    # Connected pairs (an event loop needs one). Datagram sockets, raw ones included, could send to any other by name.
    Rule("socketpair", (Check(0, (_AF_UNIX,)), Check(1, (_SOCK_STREAM,), mask=_TYPE_OF_SOCKET))),
    # To the other end only: no address, in either half of the pointer.
    Rule("sendto", (Check(4, (0,)), Check(4, (0,), high=True))),
    # PR_SET_NAME and PR_GET_NAME; not PR_SET_PDEATHSIG, by which a session could outlive its parent.
    Rule("prctl", (Check(0, (15, 16)),)),
    # This process's limits (they can only be lowered), of no other.
    Rule("prlimit64", (Check(0, (0,)),)),
    # Duplicate, descriptor flags, status flags, locks, pipe size; not F_SETOWN and F_SETSIG, which
    # make the kernel send any signal to any process of the same uid.
    Rule("fcntl", (Check(1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)),)),
    # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS (isatty) and TIOCGWINSZ; not TIOCSTI and device calls.
    Rule("ioctl", (Check(1, (0x541B, 0x5421, 0x5450, 0x5451, 0x5401, 0x5413)),)),
)

OWN_PROCESS_ONLY = ("kill", "tgkill")
"""Calls whose first argument must be the caller's own process id."""

ABSENT = ("clone3", "openat2")
"""Calls that answer ENOSYS: their flags are in memory, out of a filter's sight, and libc then uses another."""

FIRST_UNKNOWN = 450
"""Numbers from here on are newer than this table; they answer ENOSYS, so that a newer libc falls back."""

_ALLOWED = """
    read pread64 readv preadv write pwrite64 writev pwritev close lseek sendfile copy_file_range
    stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat statfs fstatfs
    getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat
    ftruncate fsync fdatasync flock umask fadvise64 dup dup2 dup3 pipe pipe2
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    recvfrom shutdown getsockopt getsockname getpeername
    brk mmap munmap mprotect mremap madvise mincore msync membarrier
    futex set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity getcpu
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack
    pause alarm setitimer getitimer restart_syscall wait4 waitid exit exit_group
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrlimit
    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
    getpriority uname sysinfo getrandom arch_prctl
"""

_X86_64 = """
    read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12
    rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19 writev 20
    access 21 pipe 22 select 23 sched_yield 24 mremap 25 msync 26 mincore 27 madvise 28 dup 32 dup2 33 pause 34
    nanosleep 35 getitimer 36 alarm 37 setitimer 38 getpid 39 sendfile 40 sendto 44 recvfrom 45
    shutdown 48 getsockname 51 getpeername 52 socketpair 53 getsockopt 55 clone 56 exit 60 wait4 61
    kill 62 uname 63 fcntl 72 flock 73 fsync 74 fdatasync 75 ftruncate 77 getcwd 79 chdir 80 fchdir 81 rename 82
    mkdir 83 rmdir 84 link 86 unlink 87 readlink 89 umask 95 gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99
    times 100 getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 getpgrp 111 getgroups 115 getresuid 118
    getresgid 120 getpgid 121 getsid 124 rt_sigpending 127 rt_sigtimedwait 128 rt_sigsuspend 130 sigaltstack 131
    statfs 137 fstatfs 138 getpriority 140 prctl 157 arch_prctl 158 gettid 186 time 201 futex 202
    sched_getaffinity 204 epoll_create 213 getdents64 217 set_tid_address 218 restart_syscall 219 fadvise64 221
    clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231 epoll_wait 232 epoll_ctl 233 tgkill 234
    waitid 247 openat 257 mkdirat 258 newfstatat 262 unlinkat 263 renameat 264 linkat 265 readlinkat 267
    faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 get_robust_list 274 epoll_pwait 281 eventfd2 290
    epoll_create1 291 dup3 292 pipe2 293 preadv 295 pwritev 296 prlimit64 302 getcpu 309 renameat2 316
    getrandom 318 membarrier 324 copy_file_range 326 statx 332 rseq 334 clone3 435 close_range 436 openat2 437
    faccessat2 439 epoll_pwait2 441
"""

_AARCH64 = """
    getcwd 17 eventfd2 19 epoll_create1 20 epoll_ctl 21 epoll_pwait 22 dup 23 dup3 24 fcntl 25 ioctl 29 flock 32
    mkdirat 34 unlinkat 35 linkat 37 renameat 38 statfs 43 fstatfs 44 ftruncate 46 faccessat 48 chdir 49 fchdir 50
    openat 56 close 57 pipe2 59 getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 pread64 67 pwrite64 68
    preadv 69 pwritev 70 sendfile 71 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 fsync 82
    fdatasync 83 exit 93 exit_group 94 waitid 95 set_tid_address 96 futex 98 set_robust_list 99 get_robust_list 100
    nanosleep 101 getitimer 102 setitimer 103 clock_gettime 113 clock_getres 114 clock_nanosleep 115
    sched_getaffinity 123 sched_yield 124 restart_syscall 128 kill 129 tgkill 131 sigaltstack 132 rt_sigsuspend 133
    rt_sigaction 134 rt_sigprocmask 135 rt_sigpending 136 rt_sigtimedwait 137 rt_sigreturn 139 getpriority 141
    getresuid 148 getresgid 150 times 153 getpgid 155 getsid 156 getgroups 158 uname 160 getrlimit 163
    getrusage 165 umask 166 prctl 167 getcpu 168 gettimeofday 169 getpid 172 getppid 173 getuid 174 geteuid 175
    getgid 176 getegid 177 gettid 178 sysinfo 179 socketpair 199 getsockname 204 getpeername 205 sendto 206
    recvfrom 207 getsockopt 209 shutdown 210 brk 214 munmap 215 mremap 216 clone 220
    mmap 222 fadvise64 223 mprotect 226 msync 227 mincore 232 madvise 233 wait4 260 prlimit64 261 renameat2 276
    getrandom 278 membarrier 283 copy_file_range 285 statx 291 rseq 293 clone3 435 close_range 436 openat2 437
    faccessat2 439 epoll_pwait2 441
"""


def _table(text: str) -> dict[str, int]:
    words = text.split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


ALLOWED = tuple(_ALLOWED.split())
NUMBERS = {"x86_64": _table(_X86_64), "aarch64": _table(_AARCH64)}
