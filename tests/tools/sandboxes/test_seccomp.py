"""The assembled filter, run by a small interpreter of classic BPF: no kernel, both processors."""

from __future__ import annotations

import errno
import re
import struct
import subprocess
from collections.abc import Sequence

import pytest

from metis_agent.tools.sandboxes.inside.seccomp import ABSENT, ALLOWED, NUMBERS, OWN_PROCESS_ONLY, RULES, Filter

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
OWN = 4321


def decide(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> int:
    """What the kernel would do: seccomp_data is number, architecture, instruction pointer, six arguments."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    memory = struct.pack("<IIQ6Q", number, architecture, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator = at = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", memory, value)
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x35):
            holds = accumulator == value if code == 0x15 else accumulator >= value
            at += if_true if holds else if_false
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def answer(machine: str, name: str, *arguments: int) -> int:
    return decide(Filter(machine).program(OWN), ARCHITECTURES[machine], NUMBERS[machine][name], arguments)


def test_every_call_gets_its_answer(machine: str) -> None:
    program, architecture = Filter(machine).program(OWN), ARCHITECTURES[machine]
    ruled = {rule.name for rule in RULES} | set(OWN_PROCESS_ONLY)
    allowed = {NUMBERS[machine][name] for name in ALLOWED if name in NUMBERS[machine]}
    absent = {NUMBERS[machine][name] for name in ABSENT}
    skipped = {NUMBERS[machine][name] for name in ruled if name in NUMBERS[machine]}
    for number in set(range(600)) - skipped:
        expected = ALLOW if number in allowed else MISSING if number in absent or number >= 450 else REFUSE
        assert decide(program, architecture, number) == expected, number


def test_another_numbering_is_killed(machine: str) -> None:
    program = Filter(machine).program(OWN)
    for architecture in (0x40000003, 0x40000028, *ARCHITECTURES.values()):
        if architecture != ARCHITECTURES[machine]:
            assert decide(program, architecture, NUMBERS[machine]["read"]) == KILL


def test_the_x32_numbers_are_missing() -> None:
    program = Filter("x86_64").program(OWN)
    for name in ("read", "openat", "clone"):
        assert decide(program, ARCHITECTURES["x86_64"], 0x40000000 | NUMBERS["x86_64"][name]) == MISSING


def test_threads_but_no_processes(machine: str) -> None:
    sigchld = 17
    thread = 0x3D0F00  # the flags that glibc gives a new thread
    assert answer(machine, "clone", thread) == ALLOW
    assert answer(machine, "clone", thread & ~0x400) == REFUSE  # with descriptors of its own, out of sight
    assert answer(machine, "clone", thread | 0x10000000) == REFUSE
    assert answer(machine, "clone", sigchld) == REFUSE
    assert answer(machine, "clone", 0x01200000 | sigchld) == REFUSE  # glibc's fork
    assert answer(machine, "clone", 0x10000000 | sigchld) == REFUSE  # a user namespace


def test_only_the_own_process(machine: str) -> None:
    for name in OWN_PROCESS_ONLY:
        assert answer(machine, name, OWN, 9) == ALLOW
        for other in (OWN + 1, 0, 1, 0xFFFFFFFF):
            assert answer(machine, name, other, 9) == REFUSE
    assert answer(machine, "prlimit64", 0) == ALLOW
    assert answer(machine, "prlimit64", OWN) == REFUSE


def test_opening(machine: str) -> None:
    o_wronly, o_rdwr, o_creat, o_trunc = 1, 2, 0o100, 0o1000
    for flags, expected in (
        (0, ALLOW),
        (o_wronly | o_creat | o_trunc, ALLOW),
        (o_rdwr | o_trunc, ALLOW),
        (o_trunc, REFUSE),
        (3 | o_trunc, REFUSE),
        (3, ALLOW),
    ):
        assert answer(machine, "openat", 0, 0, flags) == expected
    if machine == "x86_64":
        assert answer(machine, "open", 0, o_trunc) == REFUSE


def test_arguments(machine: str) -> None:
    f_setfl, f_setown, f_setsig, f_setpipe, f_add_seals = 4, 8, 10, 1031, 1033
    assert answer(machine, "fcntl", 0, f_setfl) == ALLOW
    for command in (f_setown, f_setsig, 15, 1024, f_setpipe, f_add_seals):
        assert answer(machine, "fcntl", 0, command) == REFUSE
    assert answer(machine, "ioctl", 0, 0x5401) == ALLOW
    assert answer(machine, "ioctl", 0, 0x5412) == REFUSE  # TIOCSTI
    stream, close_on_exec = 1, 0o2000000
    assert answer(machine, "socketpair", 1, stream) == answer(machine, "socketpair", 1, stream | close_on_exec) == ALLOW
    assert answer(machine, "socketpair", 2, stream) == REFUSE
    for datagram in (2, 3, 4, 5, 2 | close_on_exec):
        assert answer(machine, "socketpair", 1, datagram) == REFUSE
    assert answer(machine, "sendto", 3, 0x7FFF0000, 5, 0, 0) == ALLOW
    for address in (1, 0x7FFF0000, 1 << 32):
        assert answer(machine, "sendto", 3, 0x7FFF0000, 5, 0, address) == REFUSE
    assert answer(machine, "prctl", 15) == ALLOW
    for option in (1, 4, 22, 38, 24):
        assert answer(machine, "prctl", option) == REFUSE


def test_every_name_has_a_number_somewhere() -> None:
    names = {*ALLOWED, *ABSENT, *OWN_PROCESS_ONLY, *(rule.name for rule in RULES)}
    assert names == set(NUMBERS["x86_64"]) | set(NUMBERS["aarch64"])
    for table in NUMBERS.values():
        assert len(set(table.values())) == len(table)


def test_numbers_are_the_kernels(machine: str) -> None:
    header = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}[machine]
    try:
        text = subprocess.run(["cat", f"/usr/include/{header}"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no kernel headers here")
    found = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+)\s+(\d+)\s", text)}
    # The generic table names some calls by their 32-bit twin.
    twins = {name: f"3264_{name}" for name in NUMBERS[machine]} | {"newfstatat": "3264_fstatat"}
    compared = 0
    for name, number in NUMBERS[machine].items():
        known = found.get(name, found.get(twins[name]))
        if known is not None:
            assert known == number, name
            compared += 1
    assert compared > 100


def test_an_unknown_processor() -> None:
    with pytest.raises(OSError, match="'riscv64'"):
        Filter("riscv64")
