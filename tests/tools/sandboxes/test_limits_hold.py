"""Limits hold however the code goes about it: by the kernel, by the host's watch, as root and as an ordinary user."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from metis_agent.tools.sandboxes import BubblewrapSandbox, LandlockSandbox, Sandbox, SandboxLimits

from .conftest import opened
from .test_ordinary_user import as_nobody

LIMITS = SandboxLimits(seconds=2, memory_mb=256, processes=8, disk_mb=4, output_bytes=4096)
MOST_MB = 4.8
"""What may be taken of the disk: 20% more than the limit."""

DRIP = """
import os, struct, threading, time
def drip():
    os.write(3, struct.pack('!QI', {call}, 40000))
    while True:
        os.write(3, b'x'); time.sleep(0.005)
threading.Thread(target=drip, daemon=True).start()
"""

FILL = "blob = b'x' * (1 << 20)\nfor n in range(40):\n    with open(f'f{n}', 'wb') as file: file.write(blob)\n"

# Each tries to hold more than 4 MB of files, and what it holds is counted by the second call, where there is one.
HOARDS = {
    "in a deep tree": (
        "import os\nfor _ in range(18):\n    os.mkdir('d' * 250)\n    os.chdir('d' * 250)\n" + FILL,
        "sum(os.stat(name).st_blocks * 512 for name in os.listdir())",
    ),
    "in many folders": (
        "import os\nfor n in range(400):\n    os.mkdir(f'd{n}')\n    open(f'd{n}/f', 'wb').write(b'x' * 65536)\n",
        "sum(os.stat(f'd{n}/f').st_blocks * 512 for n in range(400) if os.path.exists(f'd{n}/f'))",
    ),
    "in a folder without rights": (
        "import os\nos.umask(0)\nos.mkdir('d', 0o300)\nos.chdir('d')\n" + FILL,
        "sum(os.stat(f'f{n}').st_blocks * 512 for n in range(40) if os.path.exists(f'f{n}'))",
    ),
    "in deleted files": (
        "import os\nfds, blob = [], b'x' * (1 << 20)\nfor n in range(30):\n"
        "    fds.append(os.open('f', os.O_CREAT | os.O_RDWR))\n    os.unlink('f')\n    os.write(fds[-1], blob)\n",
        "sum(os.fstat(fd).st_blocks * 512 for fd in fds)",
    ),
    "in deleted files that are mapped": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\nblob = b'x' * (1 << 20)\n"
        "held = 0\nfor n in range(30):\n    fd = os.open('f', os.O_CREAT | os.O_RDWR)\n    os.unlink('f')\n"
        "    held += os.write(fd, blob)\n    assert libc.mmap(None, 4096, 1, 1, fd, 0) != ctypes.c_void_p(-1).value\n"
        "    os.close(fd)\n",
        "held",
    ),
    "in files on their way": (
        "import os, socket\npairs, blob, held = [], b'x' * (1 << 20), 0\nfor n in range(14):\n"
        "    a, b = socket.socketpair()\n    pairs += [a, b]\n    fd = os.open('f', os.O_CREAT | os.O_RDWR)\n"
        "    os.unlink('f')\n    for _ in range(3): held += os.write(fd, blob)\n"
        "    socket.send_fds(a, [b'x'], [fd])\n    os.close(fd)\n",
        "held",
    ),
    "in a thread's own table of descriptors": (
        "import ctypes, os, threading\nheld = 0\ndef fill():\n    global held\n"
        "    ctypes.CDLL(None).syscall(436, 1000, 1001, 2)\n    fds, blob = [], b'x' * (1 << 20)\n"
        "    for n in range(30):\n"
        "        fds.append(os.open('f', os.O_CREAT | os.O_RDWR)); os.unlink('f'); held += os.write(fds[-1], blob)\n"
        "    filled.set(); threading.Event().wait()\nfilled = threading.Event()\n"
        "threading.Thread(target=fill, daemon=True).start()\nfilled.wait(0.3)",
        "held",
    ),
    "in files that never had a name": (
        "import os\nfds, held = [], 0\nfor n in range(30):\n    fds.append(os.open('.', os.O_TMPFILE | os.O_RDWR))\n"
        "    held += os.write(fds[-1], b'x' * (1 << 20))\n",
        "held",
    ),
    "through the memory": (
        "import mmap, os\nmaps, held = [], 0\nfor n in range(30):\n    fd = os.open('f', os.O_CREAT | os.O_RDWR)\n"
        "    os.ftruncate(fd, 1 << 20)\n    maps.append(mmap.mmap(fd, 1 << 20))\n    os.unlink('f')\n    os.close(fd)\n"
        "    maps[-1][:] = b'x' * (1 << 20)\n    held += 1 << 20\n",
        "held",
    ),
    "in files with holes": (
        "import os\nfor n in range(60):\n    with open(f's{n}', 'wb') as file:\n"
        "        for k in range(0, 4 << 20, 8192):\n            file.seek(k)\n            file.write(b'x')\n",
        "sum(os.stat(name).st_blocks * 512 for name in os.listdir())",
    ),
    "copied by the kernel": (
        "import os\nopen('a', 'wb').write(b'x' * (1 << 20))\nfor n in range(30):\n"
        "    with open('a', 'rb') as one, open(f'b{n}', 'wb') as two:\n"
        "        os.sendfile(two.fileno(), one.fileno(), 0, 1 << 19)\n"
        "        os.copy_file_range(one.fileno(), two.fileno(), 1 << 19)\n",
        "sum(os.stat(name).st_blocks * 512 for name in os.listdir())",
    ),
    "under odd names": (
        "import os\nfor n in range(30):\n"
        "    open(b'\\xff\\n (deleted)' + bytes([65 + n]), 'wb').write(b'x' * (1 << 20))\n",
        "sum(os.stat(name).st_blocks * 512 for name in os.listdir(b'.'))",
    ),
    "mapped, in folders that are gone": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nlibc.mmap.restype = ctypes.c_void_p\nheld = 0\n"
        "for n in range(30):\n    os.mkdir('d\\n')\n    fd = os.open('d\\n/a', os.O_CREAT | os.O_RDWR)\n"
        "    os.unlink('d\\n/a')\n    os.rmdir('d\\n')\n"
        "    held += os.write(fd, b'x' * (1 << 20))\n    libc.mmap(None, 4096, 1, 2, fd, 0)\n    os.close(fd)\n",
        "held",
    ),
    "under one name after the other": (
        "import os\nfor n in range(30):\n    open('a', 'wb').write(b'x' * (1 << 20))\n    os.link('a', f'b{n}')\n"
        "    os.unlink('a')\n",
        "sum(os.stat(name).st_blocks * 512 for name in os.listdir())",
    ),
    "behind the main thread's end": (
        "import ctypes, os, threading, time\ndef fill():\n    time.sleep(0.1)\n"
        + "".join(f"    {line}\n" for line in FILL.splitlines())
        + "    print('all', flush=True)\n    time.sleep(9)\n"
        "threading.Thread(target=fill).start()\n"
        "ctypes.CDLL(None).syscall({'aarch64': 93}.get(os.uname().machine, 60), 0)",
        "0",
    ),
    "while an answer drips": (DRIP.format(call=1) + FILL + "print('all', flush=True)\ntime.sleep(9)", "0"),
    "while files move about": (
        "import os, threading\nfor name in 'ab': os.makedirs(f'{name}/0')\nmoving = True\ndef move():\n"
        "    while moving:\n        os.rename('a/0', 'a/1'); os.rename('b/0', 'a/0'); os.rename('a/1', 'b/0')\n"
        "mover = threading.Thread(target=move, daemon=True)\nmover.start()\nblob = b'x' * 65536\n"
        "for n in range(640):\n    try: open(f'a/0/f{n}', 'wb').write(blob)\n"
        "    except FileNotFoundError: pass\n",
        "moving = False\nmover.join()\n"
        "sum(os.stat(os.path.join(top, name)).st_blocks * 512 for top, _, names in os.walk('.') for name in names)",
    ),
}

THREADS = (
    "import threading, time\nthreading.stack_size(32768)\nstarted = 0\ntry:\n    for n in range(500):\n"
    "        threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n        started += 1\n"
    "except RuntimeError: pass\n"
)

RUN_ALL = """
held = {{}}
with Sandbox({limits!r}, **{options!r}) as sandbox:
    for name, (code, count) in {programs!r}.items():
        with sandbox.open() as session:
            first = session.run(code)
            second = None if first.state_lost else session.run(count)
            held[name] = first.status, first.stdout, second and second.result, second and second.traceback
print(json.dumps(held))
"""

KINDS: dict[str, tuple[type[Sandbox], dict[str, Any]]] = {
    "bubblewrap": (BubblewrapSandbox, {}),
    "landlock": (LandlockSandbox, {}),
    "landlock, watched": (LandlockSandbox, {"namespaces": False}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[type[Sandbox], dict[str, Any]]:
    made, options = KINDS[request.param]
    for _ in opened(request.param, made(LIMITS, **options)):
        pass
    return made, options


def outcomes(kind: tuple[type[Sandbox], dict[str, Any]], programs: dict[str, tuple[str, str]], user: str) -> Any:
    """Of each program: how its call ended, what it printed, and what the second call counted."""
    made, options = kind
    code = RUN_ALL.format(limits=LIMITS, options=options, programs=programs)
    if user == "ordinary":
        return as_nobody(made(LIMITS), code)
    printed: list[str] = []
    names = {"Sandbox": made, "SandboxLimits": SandboxLimits, "json": json, "print": printed.append}
    exec(code, names)
    return json.loads(printed[0])


@pytest.mark.parametrize("user", ["this", "ordinary"])
def test_disk(kind: tuple[type[Sandbox], dict[str, Any]], user: str) -> None:
    for name, (status, stdout, held, traceback) in outcomes(kind, HOARDS, user).items():
        assert "all" not in stdout, name
        if status not in ("killed", "timeout"):
            assert int(held or 0) <= MOST_MB * (1 << 20), (name, status, held, traceback)


@pytest.mark.parametrize("user", ["this", "ordinary"])
def test_threads(user: str) -> None:
    """Counted by the kernel in both; without namespaces an ordinary user's are counted by the host, and killed."""
    programs = {
        "plainly": (THREADS + "started", "started"),
        "while an answer drips": (
            DRIP.format(call=1) + THREADS + "print('all' if started > 8 else 'few', flush=True)",
            "0",
        ),
    }
    for kind in KINDS.values():
        for name, (status, stdout, started, _) in outcomes(kind, programs, user).items():
            if status not in ("killed", "timeout"):
                assert int(started) < LIMITS.processes, (kind, name)
            if not kind[1]:
                assert "all" not in stdout, (kind, name)


def test_ordinary_files_are_not_in_the_way(kind: tuple[type[Sandbox], dict[str, Any]]) -> None:
    """Many names of one file, and many small files within the limit, are fine."""
    programs = {
        "links": (
            "import os\nopen('f', 'wb').write(b'x' * (3 << 20))\n"
            "for n in range(100): os.link('f', f'g{n}')\nlen(os.listdir())",
            "len(os.listdir())",
        ),
        "temporary": (
            "import tempfile\nfor n in range(60):\n    with tempfile.TemporaryFile() as file:\n"
            "        _ = file.write(b'x' * (1 << 20))\n",
            "101",
        ),
    }
    for name, (status, _, count, traceback) in outcomes(kind, programs, "this").items():
        assert (status, count) == ("ok", "101"), (name, traceback)


def test_a_flood_of_parts_is_refused_at_once(kind: tuple[type[Sandbox], dict[str, Any]]) -> None:
    code = (
        "import os, struct\nsize = 3 * 4096 + 4 * (8 + 6_000_000)\npayload = b's\\0\\0\\0\\0' * (size // 5)\n"
        "data = memoryview(struct.pack('!QI', 1, len(payload)) + payload)\n"
        "while data: data = data[os.write(3, data):]"
    )
    made, options = kind
    with made(LIMITS, **options) as sandbox, sandbox.open() as session:
        before = time.process_time()
        execution = session.run(code, timeout=60)
        assert time.process_time() - before < 0.3
        assert execution.status == "killed"
        assert "more than 8 parts" in execution.reason


@pytest.mark.parametrize("programs", [4, pytest.param(1000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(0)])])
def test_random_programs(kind: tuple[type[Sandbox], dict[str, Any]], programs: int) -> None:
    """Steps drawn at random, each taking something; after all of them no limit is passed by more than a fifth."""
    steps = {
        "write": "open(f'f{draw(9)}', 'ab').write(b'x' * draw(1 << 20))",
        "truncate": "open(f'f{draw(9)}', 'w').close()",
        "delete": "os.unlink(f'f{draw(9)}')",
        "hold": "fds.append(os.open(f'f{draw(9)}', os.O_CREAT | os.O_RDWR))",
        "write held": "os.write(draw_of(fds), b'x' * draw(1 << 20))",
        "folder": "os.makedirs(f'd{draw(99)}/e{draw(99)}')",
        "hole": "os.truncate(f'f{draw(9)}', draw(4 << 20))",
        "memory": "kept.append(bytearray(draw(32 << 20)))",
        "thread": "threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()",
        "print": "print('x' * draw(1 << 16))",
        "sleep": "time.sleep(draw(20) / 1000)",
    }
    draw = random.Random(5)
    made, options = kind
    with made(LIMITS, **options) as sandbox:
        for number in range(programs):
            chosen = draw.choices([*steps.values()], k=60)
            body = "".join(
                f"try: {step}\nexcept (OSError, MemoryError, RuntimeError, IndexError): pass\n" for step in chosen
            )
            code = (
                f"import os, random, threading, time\ntable = random.Random({number})\nfds, kept = [], []\n"
                "draw, draw_of = table.randrange, table.choice\n" + body
            )
            count = (
                "paths = [os.path.join(top, name) for top, _, names in os.walk('.') for name in names]\n"
                "files = [*map(os.stat, paths), *map(os.fstat, fds)]\n"
                "seen = {(file.st_dev, file.st_ino): file.st_blocks * 512 for file in files}\n"
                "sum(seen.values()), threading.active_count(), sum(map(len, kept))"
            )
            with sandbox.open() as session:
                for _ in range(3):  # on a busy machine
                    execution = session.run(code)
                    if execution.seconds <= LIMITS.seconds * 1.2:
                        break
                assert execution.seconds <= LIMITS.seconds * 1.2, chosen
                assert len(execution.stdout.encode()) <= LIMITS.output_bytes
                if not execution.state_lost:
                    disk, threads, memory = json.loads(f"[{(session.run(count).result or '')[1:-1]}]")
                    assert disk <= MOST_MB * (1 << 20)
                    assert threads <= LIMITS.processes
                    assert memory <= 256 << 20
