"""Code that tries to take more than its share of time, memory, processes or disk: stopped, and the next call works."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from metis_agent.tools.sandboxes import Sandbox, SandboxLimits, SandboxSession

from .conftest import assert_still_works

LOOPS = {
    "plain": "while True: pass",
    "that catches everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "that ignores signals": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass"
    ),
    "in C": "sum(range(10**12))",
    "in C that never checks": "7 ** 10**9",
    "in a regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "that sleeps": "import time\ntime.sleep(3600)",
    "that waits": "import sys, threading\nsys.stdin.read()\nthreading.Event().wait()",
    "that stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("loop", LOOPS.items(), ids=lambda pair: pair[0])
def test_endless_loop(session: SandboxSession, loop: tuple[str, str]) -> None:
    for _ in range(3):  # on a busy machine
        session.run("kept = 1")
        began = time.monotonic()
        execution = session.run("print('begun')\n" + loop[1], timeout=0.3)
        assert time.monotonic() - began < 10
        assert execution.status == "timeout"
        assert execution.state_lost
        assert execution.stdout == "begun\n"
        if execution.seconds < 0.6:
            break
    assert 0.3 <= execution.seconds < 0.6
    assert "NameError" in session.run("kept").traceback
    assert_still_works(session)


FORK_BOMB = "import os\nwhile True:\n    os.fork()"


THREAD_BOMB = """
import threading, time
threading.stack_size(32768)
started = 0
try:
    for _ in range(5000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
time.sleep(0.2)
started
"""


HOARDS = ("bytearray(8 << 30)", "[bytearray(1 << 20) for _ in range(8192)]", "'x' * (1 << 33)")


def test_fork_bomb(session: SandboxSession) -> None:
    before = count_of_processes()
    execution = session.run(FORK_BOMB, timeout=2)
    assert execution.status == "error"
    assert "PermissionError" in execution.traceback
    assert count_of_processes() < before + 50
    assert_still_works(session)


def test_thread_bomb(session: SandboxSession) -> None:
    execution = session.run(THREAD_BOMB, timeout=5)
    # Refused by the kernel where the session has a uid of its own, killed by the host where not.
    assert execution.status == "killed" or int(execution.result or "9999") < 16, execution
    assert_still_works(session)


@pytest.mark.parametrize("amount", HOARDS)
def test_memory(session: SandboxSession, amount: str) -> None:
    execution = session.run(f"kept = {amount}", timeout=10)
    assert execution.status in ("error", "killed")
    assert_still_works(session)


def test_output(session: SandboxSession, sandbox: Sandbox) -> None:
    execution = session.run(
        "import sys\nfor _ in range(100):\n    print('x' * 1_000_000)\nsys.stderr.write('y' * 10**8)\n'z' * 10**7"
    )
    assert execution.status == "ok"
    assert execution.truncated
    for text in (execution.stdout, execution.stderr, execution.result or ""):
        assert 0 < len(text) <= sandbox.limits.output_bytes
    assert_still_works(session)


def test_a_huge_error_message(session: SandboxSession, sandbox: Sandbox) -> None:
    execution = session.run("raise ValueError('x' * 10**6)")
    assert execution.status == "error"
    assert execution.truncated
    assert len(execution.traceback) <= sandbox.limits.output_bytes
    short_of_memory = session.run("raise ValueError('x' * 10**8)")
    assert short_of_memory.traceback.count("ValueError: xxx") == 1


DISK_CODE = """
import os
written = 0
try:
    for number in range(400):
        {step}
        written += 1
except OSError as error:
    print(error)
written
"""


FILLINGS = {
    "many files": "open(f'file{number}', 'wb').write(b'x' * (1 << 20))",
    "one file": "open('one', 'ab').write(b'x' * (1 << 20))",
    "deleted files": "f = os.open('f', os.O_CREAT | os.O_RDWR); os.write(f, b'x' * (1 << 20)); os.unlink('f')",
}


@pytest.mark.parametrize("filling", FILLINGS)
def test_disk(session: SandboxSession, filling: str) -> None:
    execution = session.run(DISK_CODE.format(step=FILLINGS[filling]))
    assert execution.status == "killed" or int(execution.result or "9999") <= 8, execution
    assert_still_works(session)


def test_files_without_end(session: SandboxSession) -> None:
    execution = session.run("for number in range(100_000):\n    open(f'file{number}', 'w').close()", timeout=8)
    assert execution.status in ("killed", "error"), execution
    assert_still_works(session)


def test_a_folder_hidden_from_the_quota(session: SandboxSession) -> None:
    code = "import os, time\nos.mkdir('d', 0o300)\n"
    code += "for n in range(32):\n    open(f'd/{n}', 'wb').write(b'x' * (1 << 20))\ntime.sleep(0.2)"
    assert session.run(code).status in ("killed", "error")
    assert_still_works(session)


@pytest.mark.parametrize("folder", ["/dev/shm", "/var/tmp", "/run", "/"])
def test_other_places_to_fill(session: SandboxSession, folder: str) -> None:
    assert session.run(f"open({folder!r} + '/metis-test', 'w').write('x')").status == "error"
    assert_still_works(session)


def test_a_tree_that_is_hard_to_remove(sandbox: Sandbox) -> None:
    with sandbox.open() as session:
        code = """
import os
for name in ("closed", "deep"):
    os.mkdir(name)
os.chdir("deep")
for _ in range(400):
    os.mkdir("d" * 100)
    os.chdir("d" * 100)
"""
        assert session.run(code, timeout=5).ok
        assert session.run("os.mkdir('sealed', 0)").ok
    for folder in Path("/tmp").glob(f"metis-sandbox-{os.getpid()}-*"):
        ahead = [*folder.iterdir()]  # a session that is made ahead of time has its folder there, with nothing in it
        assert len(ahead) <= 1
        assert not any([*each.iterdir()] for each in ahead)


def test_crash_in_native_code(session: SandboxSession) -> None:
    execution = session.run("import ctypes\nctypes.string_at(0)")
    assert execution.status == "killed"
    assert_still_works(session)


def test_deep_recursion(session: SandboxSession) -> None:
    execution = session.run("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", timeout=1)
    assert execution.status in ("error", "killed", "timeout")
    assert_still_works(session)


def test_many_sessions_attack_together(sandbox: Sandbox) -> None:
    """Under a crowd of hostile sessions, an honest one keeps its time and its result."""
    attacks = [
        "while True: pass",
        "import os\nwhile True:\n    os.fork()",
        "x = [bytearray(1 << 20) for _ in range(9999)]",
    ]
    limits = SandboxLimits(seconds=0.5, memory_mb=64, disk_mb=4, output_bytes=1024)

    def attack(number: int) -> None:
        with sandbox.open(limits) as session:
            session.run(attacks[number % len(attacks)])

    crowd = [threading.Thread(target=attack, args=(number,)) for number in range(9)]
    for thread in crowd:
        thread.start()
    with sandbox.open() as honest:
        assert honest.run("sum(range(1000))").result == "499500"
    for thread in crowd:
        thread.join()


def count_of_processes() -> int:
    return sum(name.isdigit() for name in os.listdir("/proc"))
