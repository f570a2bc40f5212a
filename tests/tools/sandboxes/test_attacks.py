"""Code that tries to get out, or to take more than its share: contained, and the next call works.

`test_attack_is_real` runs the same code where nothing contains it, so that an attack which could never
succeed is found out.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from metis_agent.tools.sandboxes import Execution, Sandbox, SandboxLimits, SandboxSession

from .conftest import SECRET

# Each code ends in an expression that is "escaped" if the attack worked. `{folder}` is a folder of the
# host that any uid may write to; `{folder}/.ssh/id_rsa` holds the secret; `{host}` is the host's pid.
REACHING_OUT = {
    "read /etc/passwd": "'root' in open('/etc/passwd').read() and 'escaped'",
    "read ~/.ssh": "'secret' in open('{folder}/.ssh/id_rsa').read() and 'escaped'",
    "list a folder": "import os\nos.listdir('{folder}') and 'escaped'",
    "read through the current folder": (
        "import os\nos.chdir('{folder}/.ssh')\n'secret' in open('id_rsa').read() and 'escaped'"
    ),
    "read through a symlink": (
        "import os\nos.symlink('{folder}/.ssh/id_rsa', 'link')\n'secret' in open('link').read() and 'escaped'"
    ),
    "read through a hard link": (
        "import os\nos.link('{folder}/.ssh/id_rsa', 'link')\n'secret' in open('link').read() and 'escaped'"
    ),
    "read the host's environment": "len(open('/proc/{host}/environ', 'rb').read()) and 'escaped'",
    "write outside": "open('{folder}/new', 'w').write('x') and 'escaped'",
    "append outside": "open('{folder}/.ssh/id_rsa', 'a').write('x') and 'escaped'",
    "truncate outside": "import os\nos.truncate('{folder}/.ssh/id_rsa', 0)\n'escaped'",
    "truncate on a reading open": (
        "import os\nos.open('{folder}/.ssh/id_rsa', os.O_RDONLY | os.O_TRUNC)\n"
        "os.stat('{folder}/.ssh/id_rsa').st_size == 0 and 'escaped'"
    ),
    "truncate on an open with no access mode": (
        "import os\nos.open('{folder}/.ssh/id_rsa', 3 | os.O_TRUNC)\n"
        "os.stat('{folder}/.ssh/id_rsa').st_size == 0 and 'escaped'"
    ),
    "remove outside": "import os\nos.remove('{folder}/.ssh/id_rsa')\n'escaped'",
    "make a folder outside": "import os\nos.mkdir('{folder}/new')\n'escaped'",
    "rename outside": "import os\nos.rename('{folder}/.ssh/id_rsa', '{folder}/.ssh/renamed')\n'escaped'",
    "chmod outside": "import os\nos.chmod('{folder}/.ssh/id_rsa', 0o600)\n'escaped'",
    "utime outside": "import os\nos.utime('{folder}/.ssh/id_rsa', (1, 1))\n'escaped'",
    "set an attribute outside": "import os\nos.setxattr('{folder}/.ssh/id_rsa', 'user.x', b'y')\n'escaped'",
    "signal the host": "import os\nos.kill({host}, 0)\n'escaped'",
    "limit the host": (
        "import resource\nresource.prlimit({host}, resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE))\n"
        "'escaped'"
    ),
    "renice the host": (
        "import os\nkind = os.PRIO_PROCESS\nos.setpriority(kind, {host}, os.getpriority(kind, {host}))\n'escaped'"
    ),
    "move the host to a core": "import os\nos.sched_setaffinity({host}, os.sched_getaffinity({host}))\n'escaped'",
    "hold the host by a pidfd": "import os\nos.pidfd_open({host}) and 'escaped'",
    "have the kernel signal the host": (
        "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {host})\n'escaped'"
    ),
    "connect to a TCP server": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)\n'escaped'"),
    "connect to a Unix socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('{folder}/socket')\n'escaped'"
    ),
    "connect to an abstract socket": (
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('\\0metis-test-{host}')\n'escaped'"
    ),
    "listen": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\n'escaped'",
    "run a program": "import subprocess\nsubprocess.run(['/bin/true'], check=True)\n'escaped'",
    "run a shell": "import os\nos.system('true') == 0 and 'escaped'",
    "leave a daemon": (
        "import os\npid = os.fork()\nif pid == 0:\n    os.setsid()\n    os._exit(0)\nos.waitpid(pid, 0)\n'escaped'"
    ),
    "fork in C": (
        "import ctypes, os\npid = ctypes.CDLL(None).fork()\nif pid == 0:\n    os._exit(0)\npid > 0 and 'escaped'"
    ),
    "four processes of 1 GB": (
        "import multiprocessing\nm = multiprocessing.get_context('fork')\n"
        "children = [m.Process(target=bytearray, args=(1 << 30,)) for _ in range(4)]\n"
        "[child.start() for child in children]\n[child.join() for child in children]\n'escaped'"
    ),
    "memory of a file that has no name": "import os\nos.memfd_create('x') and 'escaped'",
    "memory of another owner": "import ctypes\nctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0 and 'escaped'",
    "raise a limit": (
        "import resource\nsoft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (min(hard, 1 << 40), 1 << 40))\n"
        "resource.getrlimit(resource.RLIMIT_FSIZE)[1] == 1 << 40 and 'escaped'"
    ),
    "be root": "import os\nos.setuid(0)\n'escaped'",
    "outlive the parent": "import ctypes\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0 and 'escaped'",
}

NEEDS_RIGHTS = {
    # Refused by the kernel to an ordinary user as well, or by the file system; real as root or elsewhere.
    "set an attribute outside",
    "raise a limit",
    "be root",
}


def assert_still_works(session: SandboxSession) -> None:
    assert session.run("40 + 2").result == "42"


@pytest.mark.parametrize("attack", REACHING_OUT)
def test_contained(any_sandbox: Sandbox, target: dict[str, object], tcp_port: int, attack: str) -> None:
    before = state_of(target)
    with any_sandbox.open() as session:
        execution = session.run(REACHING_OUT[attack].format(**target | {"port": tcp_port}), timeout=5)
        assert execution.result != "'escaped'", attack
        assert execution.status != "timeout", "an attack should be refused, not wait"
        assert SECRET not in repr(execution)
        assert state_of(target) == before
        assert_still_works(session)


@pytest.mark.parametrize("attack", [a for a in REACHING_OUT if a not in NEEDS_RIGHTS])
def test_attack_is_real(unsafe_session: SandboxSession, target: dict[str, object], tcp_port: int, attack: str) -> None:
    execution = unsafe_session.run(REACHING_OUT[attack].format(**target | {"port": tcp_port}), timeout=20)
    if attack == "four processes of 1 GB" and execution.status != "ok":
        pytest.skip("not enough memory here")
    assert execution.result == "'escaped'", execution


def state_of(target: dict[str, object]) -> object:
    key = target["key"]
    assert isinstance(key, Path)
    status = key.stat()
    names = sorted(str(path) for path in Path(str(target["folder"])).rglob("*"))
    return names, key.read_text(), status.st_mode, status.st_uid, status.st_mtime_ns


RAW_CALLS = {
    # Number on x86_64, on aarch64.
    "fork": (57, None),
    "vfork": (58, None),
    "clone3": (435, 435),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "open_by_handle_at": (304, 265),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "timer_create": (222, 107),
    "personality": (135, 92),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "openat2": (437, 437),
    "execve": (59, 221),
    "execveat": (322, 281),
    "mknodat": (259, 33),
    "symlinkat": (266, 36),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
    "setuid": (105, 146),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264),
    "quotactl": (179, 60),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "acct": (163, 89),
    "socket": (41, 198),
    "connect": (42, 203),
    "setsockopt": (54, 208),
}


def test_raw_calls_are_refused(session: SandboxSession) -> None:
    code = f"""
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
index = ["x86_64", "aarch64"].index(platform.machine())
allowed = []
for name, numbers in {RAW_CALLS!r}.items():
    if numbers[index] is None:
        continue
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(numbers[index]), *[ctypes.c_long(0)] * 6)
    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        allowed.append((name, result, ctypes.get_errno()))
allowed
"""
    execution = session.run(code)
    assert (execution.status, execution.result) == ("ok", "[]"), execution


def test_another_sessions_files(sandbox: Sandbox, session: SandboxSession) -> None:
    with sandbox.open() as other:
        folder = other.run(
            "import os\nopen('note', 'w').write('secret-of-the-other')\nprint(os.getcwd())"
        ).stdout.strip()
        own = session.run("import os\nprint(os.getcwd())").stdout.strip()
        for path in (f"{folder}/note", f"{own}/../{os.path.basename(folder)}/note"):
            execution = session.run(f"print(open({path!r}).read())")
            assert execution.status == "error"
            assert "secret-of-the-other" not in execution.stdout
        parent = session.run(f"import os\nprint(os.listdir({folder!r} + '/..'))")
        assert parent.status == "error"
        assert other.run("open('note').read()").result == "'secret-of-the-other'"
    assert_still_works(session)


def test_another_sessions_process(sandbox: Sandbox, session: SandboxSession) -> None:
    with sandbox.open() as other:
        pid = other.run("import os\nkept = 'alive'\nos.getpid()").result
        attempts = f"""
import ctypes, os, signal
done = []
for name, attempt in {{
    "kill": lambda: os.kill({pid}, signal.SIGKILL),
    "kill everything": lambda: os.kill(-1, signal.SIGKILL),
    "kill the group": lambda: os.killpg(0, signal.SIGKILL),
    "read its memory": lambda: open("/proc/{pid}/mem", "rb").read(1),
    "read its open files": lambda: os.listdir("/proc/{pid}/fd"),
    "trace it": lambda: ctypes.CDLL(None).ptrace(16, {pid}, 0, 0) == 0 or 1 / 0,
}}.items():
    try:
        attempt()
        done.append(name)
    except (OSError, ZeroDivisionError):
        pass
done
"""
        assert session.run(attempts).result == "[]"
        assert other.run("kept").result == "'alive'"
    assert_still_works(session)


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
    session.run("kept = 1")
    began = time.monotonic()
    execution = session.run("print('begun')\n" + loop[1], timeout=0.3)
    assert execution.status == "timeout"
    assert execution.state_lost
    assert execution.stdout == "begun\n"
    assert 0.3 <= execution.seconds < 0.6
    assert time.monotonic() - began < 1.5
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
    assert not [
        name
        for name in os.listdir("/tmp")
        if name.startswith(f"metis-sandbox-{os.getpid()}-") and os.listdir(f"/tmp/{name}")
    ]


FORGE = """
import os
from inside import wire
def forge(picture, count):
    os.write(3, wire.pack_frame(1, wire.pack_parts({b"s": b"o", b"p": picture * count})))
"""
FORGERIES = {
    "an answer": "os.write(3, wire.pack_frame(1, wire.pack_parts({b's': b'o', b'r': b'forged'})))",
    "an endless answer": "os.write(3, wire._FRAME.pack(1, 2**32 - 1))",
    "an answer with a part that runs out": "os.write(3, wire.pack_frame(1, b'e' + b'\\xff' * 8))",
    "rubbish": "os.write(3, os.urandom(64))",
    "more pictures than may come": "forge(b'\\0\\0\\0\\1' * 2 + b'rgb', 5)",
    "a picture without pixels": "forge(b'\\0\\0\\x10\\0' * 2, 1)",
    "a picture of no size": "forge(b'\\0' * 8, 1)",
    "a picture of endless size": "forge(b'\\xff' * 8 + b'x' * 99, 1)",
    "a picture longer than may come": "forge(b'\\0\\0\\x20\\0\\0\\0\\0\\1' + b'x' * 3 * 8192, 1)",
    "half a picture": "forge(b'\\0\\0\\0', 1)",
    "notes without end": "os.write(3, wire.pack_frame(1, wire.pack_parts({b's': b'o', b'n': b'a\\n' * 10**4})))",
    "half an answer": "os.write(3, wire.pack_frame(1, b'x' * 100)[:20]); os._exit(0)",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_answers(sandbox: Sandbox, forgery: str) -> None:
    """Code can lie about its own result; it must not reach the host's memory, or another session's result."""
    with sandbox.open() as session, sandbox.open() as other:
        first = session.run(FORGE + FORGERIES[forgery], timeout=2)
        assert isinstance(first, Execution)
        assert len(repr(first)) < 40_000
        assert len(first.images) <= sandbox.limits.images
        assert other.run("1 + 1").result == "2"
        # A forged answer leaves the real one on the stream: that shows at the next call, which says so.
        second = session.run("40 + 2")
        assert second.result == "42" or second.status == "killed"
        assert_still_works(session)


def test_forged_screen(session: SandboxSession, sandbox: Sandbox) -> None:
    code = """
import mmap, os, struct
screen = mmap.mmap(4, 0)
screen[:32] = struct.pack("=QQQQ", 2**63, 2**63, 2**64 - 1, 0)
try:
    os.ftruncate(4, 0)
except OSError:
    pass
os._exit(0)
"""
    execution = session.run(code)
    assert execution.status == "killed"
    assert len(execution.stdout) <= sandbox.limits.output_bytes
    assert len(execution.stderr) <= sandbox.limits.output_bytes
    assert_still_works(session)


def test_closed_descriptors(session: SandboxSession) -> None:
    assert session.run("import os\nos.closerange(0, 64)").status == "killed"
    assert_still_works(session)


def test_no_time_between_calls(session: SandboxSession) -> None:
    """A thread that a call leaves behind stands still until the next call."""
    session.run(
        "import threading, time\nticks = []\ndef tick():\n    while True:\n        ticks.append(1); time.sleep(0.001)"
    )
    before = int(session.run("threading.Thread(target=tick, daemon=True).start(); len(ticks)").result or "")
    time.sleep(0.4)
    after = int(session.run("len(ticks)").result or "")
    assert after - before < 100


def test_the_hosts_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch, session: SandboxSession) -> None:
    monkeypatch.setenv("METIS_TEST_KEY", SECRET)
    assert SECRET not in (session.run("import os\ndict(os.environ)").result or "")


def test_descriptors_of_the_host_are_not_inherited(session: SandboxSession) -> None:
    """Standard streams on /dev/null, the session's own, and at most the interpreter's folders."""
    code = """
import os, stat
found = []
for fd in range(64):
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        continue
    if not stat.S_ISDIR(mode):
        found.append(fd)
found
"""
    # The stream is 3; the screen is 4, and once more as the mapping's own.
    assert session.run(code).result == "[0, 1, 2, 3, 4, 5]"


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
