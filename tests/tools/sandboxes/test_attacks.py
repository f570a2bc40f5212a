"""Code that tries to get out: contained, and the next call works.

`test_attack_is_real` runs the same code where nothing contains it, so that an attack which could never
succeed is found out.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metis_agent.tools.sandboxes import Sandbox, SandboxSession

from .conftest import SECRET, assert_still_works

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
    "send a datagram": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', '{folder}/log') and 'escaped'"
    ),
    "send a datagram to an abstract name": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendto(b'x', '\\0metis-test-{host}-log') and 'escaped'"
    ),
    "send a raw message": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)\n"
        "a.sendto(b'x', '{folder}/log') and 'escaped'"
    ),
    "send a message with an address": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.sendmsg([b'x'], [], 0, '{folder}/log') and 'escaped'"
    ),
    "connect a datagram socket": (
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "a.connect('{folder}/log')\na.send(b'x') and 'escaped'"
    ),
    "pass a descriptor": (
        "import os, socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [os.pipe()[0]]) and 'escaped'"
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
found[:5], len(found)
"""
    # The stream is 3; the screen is 4, and once more as the mapping's own.
    assert session.run(code).result == "([0, 1, 2, 3, 4], 6)"
