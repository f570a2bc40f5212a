"""Nothing is left behind: sessions that are closed, forgotten or cancelled, and the end of the process."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_agent.errors import SandboxGoneError
from metis_agent.tools.sandboxes import E2BSandbox, E2BSession

from ..e2b_server import E2BServer
from .watching import LIMITS, only, started, until

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_a_session_kills_its_sandbox(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    session.close()
    session.close()
    until(lambda: server.sandboxes == {})
    with pytest.raises(SandboxGoneError, match="closed"):
        session.run("1")


def test_closing_ends_a_call(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(session.run, "import time; time.sleep(60)") for _ in range(2)]
        until(lambda: started(server))
        session.close()
        for call in calls:
            with pytest.raises(SandboxGoneError, match="closed"):
                call.result(timeout=10)
    until(lambda: server.sandboxes == {})


def test_a_forgotten_session_is_killed(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = sandbox.open()
    session.run("1")
    del session
    gc.collect()
    until(lambda: server.sandboxes == {})


def test_closing_the_backend(server: E2BServer) -> None:
    sandbox = E2BSandbox(LIMITS)
    sessions = [sandbox.open() for _ in range(3)]

    def loops() -> int:
        return sum(thread.name == "metis-e2b" for thread in threading.enumerate())

    before = loops()
    sandbox.close()
    # It has waited for the service to confirm.
    assert server.sandboxes == {}
    assert loops() == before - 1
    sandbox.close()
    for session in sessions:
        session.close()
    with pytest.raises(SandboxGoneError, match="closed"):
        sandbox.open()


def test_the_end_of_the_process(server: E2BServer) -> None:
    code = "from metis_agent.tools.sandboxes import E2BSandbox\nprint(E2BSandbox().open().run('1').result)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert server.made == 1
    assert server.sandboxes == {}


def test_a_fork_leaves_it_alone(server: E2BServer, session: E2BSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.run("x = 7")
    with monkeypatch.context() as fork:
        fork.setattr(os, "getpid", lambda: -1)
        with pytest.raises(SandboxGoneError, match="forked"):
            session.run("x")
    assert session.run("x").result == "7"


# --- async -----------------------------------------------------------------------------------------------------------


async def test_async_sessions(server: E2BServer, sandbox: E2BSandbox) -> None:
    sessions = await asyncio.gather(*(sandbox.aopen() for _ in range(3)))
    await asyncio.gather(*(session.arun(f"x = {number}") for number, session in enumerate(sessions)))
    found = await asyncio.gather(*(session.arun("x") for session in sessions))
    assert [execution.result for execution in found] == ["0", "1", "2"]
    assert (await sessions[0].arun("while True: pass", timeout=0.3)).status == "timeout"
    for session in sessions:
        session.close()
    await asyncio.to_thread(until, lambda: server.sandboxes == {})


async def test_cancelling_a_call_ends_its_code(server: E2BServer, sandbox: E2BSandbox) -> None:
    session = await sandbox.aopen()
    await session.arun("x = 1")
    remote = only(server)
    call = asyncio.create_task(session.arun("import time; time.sleep(60)"))
    await asyncio.to_thread(until, lambda: started(server, 2))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.to_thread(until, lambda: remote.id not in server.sandboxes)
    await asyncio.to_thread(until, lambda: remote.process.poll() is not None)
    assert "NameError" in (await session.arun("x")).traceback
    session.close()
    await asyncio.to_thread(until, lambda: server.sandboxes == {})


async def test_cancelling_an_opening_leaves_nothing(server: E2BServer, sandbox: E2BSandbox) -> None:
    server.create_fault, server.stall_seconds = "stall", 0.4
    opening = asyncio.create_task(sandbox.aopen())
    await asyncio.to_thread(until, lambda: ("POST", "/v2/sandboxes") in server.requests)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await asyncio.to_thread(until, lambda: server.made == 1)
    await asyncio.to_thread(until, lambda: server.sandboxes == {})
