"""As root the sessions drop to a uid of their own; without root they must be contained all the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from metis_agent.tools.sandboxes import BubblewrapSandbox, Sandbox
from metis_agent.tools.sandboxes.inside.paths import everyone_may_enter

from .conftest import LIGHT_IMPORT, PACKAGE, SECRET
from .test_attacks import REACHING_OUT, state_of
from .test_greed import DISK_CODE, FILLINGS, FORK_BOMB, HOARDS, LOOPS, THREAD_BOMB

NOBODY = 65534

BECOME_NOBODY = """
import json, os, sys
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
import metis_agent.tools.sandboxes as sandboxes
from metis_agent.tools.sandboxes import SandboxLimits
from metis_agent.tools.sandboxes.choose import failures
Sandbox = getattr(sandboxes, kind)
"""

AS_IT_IS = BECOME_NOBODY[BECOME_NOBODY.index("import metis_agent.tools") :].replace(
    "import", "import json, os, sys\nimport", 1
)

CODE = """
open({own!r} + "/secret", "w").write("secret")
attacks = {{
    "read": "open({own!r} + '/secret').read()",
    "write": "open({own!r} + '/new', 'w')",
    "truncate": "import os; os.open({own!r} + '/secret', os.O_RDONLY | os.O_TRUNC)",
    "chmod": "import os; os.chmod({own!r} + '/secret', 0)",
    "signal": "import os; os.kill(%d, 0)" % os.getpid(),
    "own": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, %d)" % os.getpid(),
    "environment": "open('/proc/%d/environ').read()" % os.getpid(),
    "fork": "import os; os.fork()",
    "threads": (
        "import threading, time\\nthreading.stack_size(1 << 18)\\n"
        "for _ in range(60): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\\n"
        "time.sleep(1)"
    ),
    "disk": "for n in range(99): open('f%d' % n, 'wb').write(b'x' * (1 << 20))",
}}
with Sandbox(SandboxLimits(processes=16, disk_mb=8)) as sandbox:
    wrong = failures(sandbox)
    with sandbox.open() as session, sandbox.open() as other:
        pid = session.run("import os\\nx = 1\\nos.getpid()").result
        attacks["signal the other session"] = "import os; os.kill(%s, 9)" % pid
        attacks["read the other session"] = "open('/proc/%s/mem', 'rb').read(1)" % pid
        outcome = {{name: other.run(code).status for name, code in attacks.items()}}
        alive = session.run("x").result
        uid = session.run("import os; os.getuid()").result
print(json.dumps([wrong, outcome, alive, uid, open({own!r} + "/secret").read()]))
"""


ALL_ATTACKS = """
escaped, results, loops, taken, broken = [], {{}}, {{}}, {{}}, []
names = {names!r} | {{"host": os.getpid()}}
limits = SandboxLimits(seconds=5, memory_mb=256, processes=16, disk_mb=8, output_bytes=4096)
with Sandbox(limits) as sandbox, sandbox.open() as session:
    def attack(name, code, seconds=None):
        execution = session.run(code, timeout=seconds)
        if session.run("40 + 2").result != "42":
            broken.append(name)
        return execution

    for name, code in {reaching!r}.items():
        execution = attack(name, code.format(**names))
        results[name] = repr(execution)
        if execution.result == "'escaped'" or execution.status == "timeout":
            escaped.append(name)
    for name, code in {loops!r}.items():
        loops[name] = attack(name, code, 0.3).status
    for name, code in {taking!r}.items():
        execution = attack(name, code)
        taken[name] = execution.status, execution.result
print(json.dumps([escaped, results, loops, taken, broken]))
"""


def usable_python() -> str:
    """One that any user may run, of a version that this package supports."""
    for program in (sys.executable, shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if program and everyone_may_enter(os.path.dirname(os.path.realpath(program))):
            version = subprocess.run(
                [program, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True
            )
            if version.stdout.strip() == b"True":
                return program
    pytest.skip("no Python here that an ordinary user may run")


def as_nobody(sandbox: Sandbox, code: str) -> list[Any]:
    """What a program prints that runs as an ordinary user, with a sandbox of this kind."""
    if os.geteuid() != 0:
        pytest.skip("the other tests run as an ordinary user already")
    if not everyone_may_enter(str(PACKAGE)):
        pytest.skip("an ordinary user can't reach the package")
    kind = type(sandbox).__name__
    begin = f"kind, uid = {kind!r}, {NOBODY}\n" + BECOME_NOBODY
    ran = subprocess.run(
        [usable_python(), "-c", LIGHT_IMPORT + begin + code],
        capture_output=True,
        text=True,
        timeout=150,
        cwd="/",
        env={"PATH": os.environ["PATH"], "TMPDIR": "/tmp"},
    )
    if kind == BubblewrapSandbox.__name__ and "did not start" in ran.stderr:
        pytest.skip(f"no user namespaces for ordinary users here: {ran.stderr[-300:]}")
    assert ran.returncode == 0, ran.stderr
    printed: list[Any] = json.loads(ran.stdout)
    return printed


def test_contained_without_root(sandbox: Sandbox) -> None:
    own = tempfile.mkdtemp(dir="/tmp")
    os.chown(own, NOBODY, NOBODY)
    try:
        wrong, outcome, alive, uid, secret = as_nobody(sandbox, CODE.format(own=own))
    finally:
        shutil.rmtree(own)
    assert wrong == []
    assert set(outcome.values()) <= {"error", "killed"}, outcome
    assert (alive, uid, secret) == ("1", str(NOBODY), "secret")


def test_the_whole_list_without_root(sandbox: Sandbox, target: dict[str, object], tcp_port: int) -> None:
    """Every attack of `test_attacks` and `test_greed` that is a piece of code; after each, the next call works."""
    names = {"folder": target["folder"], "port": tcp_port}
    reaching = {
        name: code.replace("metis-test-{host}", f"metis-test-{os.getpid()}") for name, code in REACHING_OUT.items()
    }
    taking = {
        "fork bomb": FORK_BOMB,
        "thread bomb": THREAD_BOMB,
        **{amount: f"kept = {amount}" for amount in HOARDS},
        **{name: DISK_CODE.format(step=step) for name, step in FILLINGS.items()},
    }
    before = state_of(target)
    escaped, results, loops, taken, broken = as_nobody(
        sandbox, ALL_ATTACKS.format(names=names, reaching=reaching, loops=LOOPS, taking=taking)
    )
    assert escaped == broken == []
    assert SECRET not in json.dumps(results)
    assert state_of(target) == before
    assert set(loops.values()) == {"timeout"}, loops
    for name, (status, result) in taken.items():
        allowed = 8 if name in FILLINGS else 16
        assert status in ("error", "killed") or int(result or "9999") <= allowed, (name, status, result)


def test_root_drops_to_an_own_uid(sandbox: Sandbox) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can")
    with sandbox.open() as one, sandbox.open() as other:
        uids = {session.run("import os\nos.getuid()").result for session in (one, other)}
        assert len(uids) == 2
        assert not uids & {"0", str(NOBODY)}
        code = "import os\nos.getuid() == os.geteuid() == os.getgid() and os.getgroups() == []"
        assert one.run(code).result == "True"
        assert "CapEff" not in (one.run("open('/proc/self/status').read()").result or "")


VENV_CODE = """
with Sandbox(SandboxLimits(seconds=20)) as sandbox, sandbox.open() as session:
    found = session.run("import only_here\\nopen('own', 'w').write('x')\\nonly_here.VALUE, only_here.__file__")
print(json.dumps([found.status, found.result, found.traceback]))
"""


@pytest.mark.parametrize("ordinary", [False, True])
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_virtual_environment_is_visible(sandbox: Sandbox, mode: int, ordinary: bool) -> None:
    """Below /tmp, which a session's own folder must not hide, and in a folder that only its user may enter."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    base = usable_python()
    try:
        subprocess.run([base, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        (site / "only_here.py").write_text("VALUE = 42")
        folder.chmod(mode)
        if ordinary:
            if os.geteuid() != 0:
                pytest.skip("the other half runs as an ordinary user already")
            os.chown(folder, NOBODY, NOBODY)
        begin = f"kind = {type(sandbox).__name__!r}\n" + (f"uid = {NOBODY}\n" + BECOME_NOBODY if ordinary else AS_IT_IS)
        ran = subprocess.run(
            [str(folder / "env" / "bin" / "python"), "-c", LIGHT_IMPORT + begin + VENV_CODE],
            capture_output=True,
            text=True,
            timeout=100,
            cwd="/",
            env={"PATH": os.environ["PATH"], "TMPDIR": "/tmp"},
        )
        assert ran.returncode == 0, ran.stderr
        status, result, traceback = json.loads(ran.stdout)
        assert status == "ok", traceback
        assert result.startswith("(42, ")
    finally:
        shutil.rmtree(folder)
