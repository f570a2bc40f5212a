"""What a session keeps and shows, and what remains when it, its template or its host ends."""

from __future__ import annotations

import fcntl
import inspect
import os
import select
import signal
import socket
import subprocess
import sys
import termios
import textwrap
import threading
import time
from pathlib import Path

import pytest

from metis_agent.errors import ConfigurationError, InputError, SandboxGoneError
from metis_agent.tools.sandboxes import LandlockSandbox, Sandbox, SandboxLimits, SandboxSession
from metis_agent.tools.sandboxes.inside.wire import HANDLE, MAX_CODE_BYTES
from metis_agent.tools.sandboxes.template import WarmSandbox

from .conftest import LIGHT_IMPORT


def test_names_and_files_last(session: SandboxSession) -> None:
    assert session.run("import math\nx = 41\nopen('note', 'w').write('kept')").ok
    assert session.run("x + math.floor(1.5)").result == "42"
    assert session.run("open('note').read()").result == "'kept'"


def test_sessions_share_nothing(sandbox: Sandbox) -> None:
    with sandbox.open() as one, sandbox.open() as other:
        one.run("x = 1\nimport math\nmath.pi = 3")
        assert "NameError" in other.run("x").traceback
        assert other.run("import math\nmath.pi > 3").result == "True"


def test_a_session_made_ahead_of_time(sandbox: Sandbox) -> None:
    """It has what was asked for, not what the last one had; one that died meanwhile is nobody's; few are made."""
    code = "import os, resource\nos.getpid(), resource.getrlimit(resource.RLIMIT_FSIZE)[0] >> 20"
    for disk in (3, 3, 3, 5, 3):
        with sandbox.open(SandboxLimits(disk_mb=disk)) as session:
            assert (session.run(code).result or "").endswith(f", {disk})")
    assert isinstance(sandbox, WarmSandbox)
    template = sandbox._running_template()
    with sandbox.open(), sandbox.open(), sandbox.open():
        (spare,) = template._spares
        spare.stream.shutdown(socket.SHUT_WR)
        ended = select.poll()
        ended.register(spare.stream, 0)
        assert ended.poll(10_000)  # its process has closed the other side
    with sandbox.open() as session:
        assert session.run("1 + 1").result == "2"
    opening = [threading.Thread(target=lambda: sandbox.open().close()) for _ in range(20)]
    for thread in opening:
        thread.start()
    for thread in opening:
        thread.join()
    assert len(template._spares) == 1


def test_sessions_draw_different_numbers(sandbox: Sandbox) -> None:
    code = "import random\nprint(random.random())\n"
    code += "try:\n    import numpy\n    print(numpy.random.rand())\nexcept ImportError:\n    pass"
    with sandbox.open() as one, sandbox.open() as other:
        assert set(one.run(code).stdout.split()).isdisjoint(other.run(code).stdout.split())


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1 + 1", "2"),
        ("x = 1", None),
        ("None", None),
        ("'text'", "'text'"),
        ("for i in range(3): pass", None),
        ("def f():\n    return 7\nf()", "7"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nawait f()", "5"),
        ("exit()", None),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)"),
        ("import pickle\nclass Q: pass\ntype(pickle.loads(pickle.dumps(Q()))).__name__", "'Q'"),
        ("", None),
    ],
)
def test_the_last_expression_is_shown(session: SandboxSession, code: str, shown: str | None) -> None:
    execution = session.run(code)
    assert (execution.status, execution.result) == ("ok", shown)
    assert not execution.truncated


def test_the_last_result_has_a_name(session: SandboxSession) -> None:
    session.run("6 * 7")
    assert session.run("_ + 1").result == "43"


def test_streams(session: SandboxSession) -> None:
    execution = session.run(
        "import sys\nprint('out ü')\nprint('err', file=sys.stderr)\n"
        "sys.stdout.buffer.write(b'raw')\nsys.__stdout__.write('!')"
    )
    assert execution.stdout == "out ü\nraw!"
    assert execution.stderr == "err\n"
    assert session.run("1").stdout == ""


def test_half_a_surrogate_is_printed(session: SandboxSession) -> None:
    execution = session.run("print('\\ud800')\n'\\ud800'")
    assert execution.stdout == "\\ud800\n"


def test_traceback_has_the_codes_own_lines_only(session: SandboxSession) -> None:
    session.run("import json\ndef read(text):\n    return json.loads(text)")
    execution = session.run("read('{')")
    assert execution.status == "error"
    assert execution.traceback.splitlines() == [
        "Traceback (most recent call last):",
        '  File "<call 2>", line 1, in <module>',
        "    read('{')",
        '  File "<call 1>", line 3, in read',
        "    return json.loads(text)",
        "           ^^^^^^^^^^^^^^^^",
        "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ]


def test_syntax_error(session: SandboxSession) -> None:
    execution = session.run("x = (1,\ny = 2")
    assert execution.status == "error"
    assert "SyntaxError" in execution.traceback
    assert "inside" not in execution.traceback


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys\nsys.exit('enough')", "SystemExit: enough"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
        ("input()", "assign the value in the code"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise ValueError('second')", "ValueError: second"),
    ],
)
def test_errors_are_readable(session: SandboxSession, code: str, said: str) -> None:
    execution = session.run(code)
    assert execution.status == "error"
    assert said in execution.traceback


def test_ordinary_work(session: SandboxSession) -> None:
    """Late imports, files, copying, threads, an event loop, time zones."""
    code = """
import asyncio, colorsys, concurrent.futures, csv, shutil, sqlite3, tempfile, zipfile, zoneinfo
open("a.csv", "w").write("x,y\\n1,2\\n")
shutil.copy("a.csv", "b.csv")
shutil.copytree(".", "copied", ignore=shutil.ignore_patterns("copied"))
with zipfile.ZipFile("z.zip", "w") as archive:
    archive.write("a.csv")
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("x")
with sqlite3.connect("d.db") as base:
    base.execute("create table t (x)")
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    total = sum(pool.map(int, "1234"))
async def two():
    return await asyncio.to_thread(int, "2")
total + asyncio.run(two())
"""
    execution = session.run(code)
    assert execution.result == "12", execution


def test_numpy_and_pillow(session: SandboxSession) -> None:
    pytest.importorskip("numpy")
    pytest.importorskip("PIL")
    code = """
import io, numpy as np, numpy.fft
from PIL import Image
image = Image.fromarray((np.arange(64, dtype=np.uint8)).reshape(8, 8)).resize((4, 4))
buffer = io.BytesIO()
image.save(buffer, "PNG")
np.linalg.solve(np.eye(2) * 2, [2, 4]).tolist(), Image.open(io.BytesIO(buffer.getvalue())).size
"""
    assert session.run(code).result == "([1.0, 2.0], (4, 4))"


def test_limits_of_one_session(sandbox: Sandbox) -> None:
    with sandbox.open(SandboxLimits(seconds=0.2, output_bytes=256, memory_mb=64)) as session:
        assert session.run("while True: pass").status == "timeout"
        assert len(session.run("print('x' * 1000)").stdout) == 256
        assert session.run("x = bytearray(100 << 20)").status == "error"


def test_code_that_cannot_be_sent(session: SandboxSession) -> None:
    with pytest.raises(InputError, match="at most 1048576"):
        session.run("#" * (MAX_CODE_BYTES + 1))
    with pytest.raises(ConfigurationError, match=r"timeout=0.*above 0"):
        session.run("1", timeout=0)
    assert session.run("'" + "x" * (MAX_CODE_BYTES - 10) + "'; 5").result == "5"


def test_calls_from_many_threads_take_turns(session: SandboxSession) -> None:
    session.run("x = 0")
    threads = [threading.Thread(target=session.run, args=("y = x\nx = y + 1",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.run("x").result == "20"


def test_a_hundred_threads_open_at_the_same_time(sandbox: Sandbox) -> None:
    results: list[str | None] = []

    def work(number: int) -> None:
        with sandbox.open() as session:
            results.append(session.run(f"{number}").result)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(result or -1) for result in results) == list(range(100))


def test_closing_ends_a_running_call(sandbox: Sandbox) -> None:
    session = sandbox.open()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            session.run("while True: pass", timeout=30)
        except SandboxGoneError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    session.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])
    session.close()
    with pytest.raises(SandboxGoneError, match="closed"):
        session.run("1")


def test_a_died_template_is_replaced(sandbox: Sandbox) -> None:
    assert isinstance(sandbox, WarmSandbox)
    with sandbox.open() as session:
        session.run("x = 1")
        template = sandbox._template
        assert template is not None
        template._handle.send_signal(signal.SIGKILL)
        template._handle.wait(5)
        with pytest.raises(SandboxGoneError, match="lost"):
            session.run("x")
        with sandbox.open() as fresh:
            assert fresh.run("1").result == "1"
        assert session.run("2").result == "2"


def test_a_template_that_dies_under_a_call(sandbox: Sandbox) -> None:
    assert isinstance(sandbox, WarmSandbox)
    with sandbox.open() as session:
        template = sandbox._template
        assert template is not None
        timer = threading.Timer(0.2, template._handle.send_signal, [signal.SIGKILL])
        timer.start()
        with pytest.raises(SandboxGoneError):
            session.run("while True: pass", timeout=10)
        timer.join()


def test_nothing_is_left_behind(sandbox: Sandbox) -> None:
    for _ in range(2):  # from the second on, one is made ahead of time
        sandbox.open().close()
    before = settled(sandbox)
    for _ in range(10):
        with sandbox.open() as session:
            session.run("open('file', 'w').write('x')")
            session.run("while True: pass", timeout=0.02)
            session.run("import os; os._exit(1)")
    del session
    assert_comes_back_to(before)


def test_an_unclosed_session_is_freed(sandbox: Sandbox) -> None:
    for _ in range(2):
        sandbox.open().close()
    before = settled(sandbox)
    sandbox.open().run("1")
    assert_comes_back_to(before)


def top_of(folder: str) -> Path:
    """The sandbox's own folder; without namespaces a session has one in it."""
    return next(path for path in (Path(folder), *Path(folder).parents) if path.name.startswith("metis-sandbox-"))


@pytest.mark.parametrize("namespaces", [True, False])
def test_closing_the_sandbox_removes_its_folder(namespaces: bool) -> None:
    sandbox = LandlockSandbox(namespaces=namespaces)
    try:
        session = sandbox.open()
    except Exception as error:
        pytest.skip(str(error))
    folder = session.run("import os\nprint(os.getcwd())").stdout.strip()
    assert Path(folder).is_dir()
    sandbox.close()
    assert not top_of(folder).exists()
    with pytest.raises(SandboxGoneError):
        session.run("1")
    session.close()
    with pytest.raises(SandboxGoneError, match="this sandbox is closed"):
        sandbox.open()


HOST = """
import os, sys, threading
from metis_agent.tools.sandboxes import BubblewrapSandbox, LandlockSandbox
sandbox = {kind}()
sessions = [sandbox.open() for _ in range(3)]
threading.Thread(target=sessions[1].run, args=("while True: pass", 60), daemon=True).start()
sessions[2].run("open('left', 'w').write('x')")
print(sessions[0].run("import os; print(os.getcwd())").stdout.strip())
print(*descendants(os.getpid()), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "sys.exit(0)", "raise ValueError"])
def test_all_ends_with_the_host(sandbox: Sandbox, end: str) -> None:
    kind = type(sandbox).__name__
    code = LIGHT_IMPORT + inspect.getsource(descendants) + HOST.format(kind=kind, end=end)
    host = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert host.stdout, host.stderr
    folder, processes = host.stdout.splitlines()
    assert len(processes.split()) >= 4
    deadline = time.monotonic() + 20
    while running(processes.split()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(processes.split())
    if kind == "LandlockSandbox":
        assert not top_of(folder).exists()


def test_a_fork_of_the_host_has_its_own_template(sandbox: Sandbox) -> None:
    kind = type(sandbox).__name__
    code = LIGHT_IMPORT + textwrap.dedent(
        f"""
        import os
        from metis_agent.tools.sandboxes import BubblewrapSandbox, LandlockSandbox
        with {kind}() as sandbox:
            with sandbox.open() as session:
                session.run("x = 1")
                child = os.fork()
                if child == 0:
                    with sandbox.open() as mine:
                        ok = mine.run("2 + 2").result == "4"
                    sandbox.close()
                    os._exit(0 if ok else 1)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert session.run("x").result == "1"
        """
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def resources() -> tuple[int, int, list[str]]:
    """Open descriptors, processes below this one, work folders."""
    folders = [
        f"{name}/{inner}"
        for name in os.listdir("/tmp")
        if name.startswith(f"metis-sandbox-{os.getpid()}-")
        for inner in os.listdir(f"/tmp/{name}")
    ]
    return len(os.listdir("/proc/self/fd")), len(descendants(os.getpid())), sorted(folders)


def settled(sandbox: Sandbox) -> tuple[int, int, list[str]]:
    """`resources`, once the session made ahead is there, and four looks in a row agree: the closed ones are gone."""
    assert isinstance(sandbox, WarmSandbox)
    assert sandbox._template is not None
    (ahead,) = sandbox._template._spares
    until = time.monotonic() + 30
    while waiting(ahead.stream) < len(HANDLE) + len(b"ready"):
        assert time.monotonic() < until
        time.sleep(0.01)
    looks = [resources()]
    while len(looks) < 4 or any(look != looks[-1] for look in looks[-4:]):
        time.sleep(0.05)
        looks.append(resources())
    return looks[-1]


def waiting(stream: socket.socket) -> int:
    """Bytes that have come and were not read."""
    return int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, bytes(4)), sys.byteorder)


def assert_comes_back_to(before: tuple[int, int, list[str]]) -> None:
    """The template reaps its children in its own time."""
    deadline = time.monotonic() + 20
    while resources() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert resources() == before


def descendants(process: int) -> list[int]:
    """Living processes below this one."""
    import os

    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat:
                state, parent = stat.read().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(name)] = int(parent)
    found = [process]
    for known in found:
        found += [pid for pid, parent in parents.items() if parent == known]
    return found[1:]


def running(processes: list[str]) -> list[str]:
    """Those that are sessions or templates still; the number of another may be reused."""
    found = []
    for name in processes:
        try:
            if b"inside.template" in Path(f"/proc/{name}/cmdline").read_bytes():
                found.append(name)
        except OSError:
            continue
    return found
