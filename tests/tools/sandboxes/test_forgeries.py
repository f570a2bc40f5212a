"""Code that speaks in the place of its session: forged answers and screens are refused, and the next call works."""

from __future__ import annotations

import time

import pytest

from metis_agent.tools.sandboxes import Execution, Sandbox, SandboxSession

from .conftest import assert_still_works

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
        "import threading, time\nticks = []\n"
        "def tick():\n    while True:\n        ticks.append(time.monotonic()); time.sleep(0.001)"
    )
    session.run("threading.Thread(target=tick, daemon=True).start(); time.sleep(0.02)")
    time.sleep(0.3)
    assert float(session.run("time.sleep(0.02); max(b - a for a, b in zip(ticks, ticks[1:]))").result or "") > 0.2
