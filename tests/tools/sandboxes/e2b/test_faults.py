"""A service that is slow, cut off, away, or ends a sandbox: told in words, in time, and the next call works."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_agent.errors import SandboxGoneError
from metis_agent.tools.python import report
from metis_agent.tools.sandboxes import E2BSandbox, E2BSession, Execution

from ..e2b_server import E2BServer
from .watching import GRACES, LIMITS, only, started, until

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


# --- deadlines -------------------------------------------------------------------------------------------------------


def within_its_time(attempt: Callable[[], object], limit: float) -> object:
    """The outcome of an attempt that ended soon after its limit."""
    for grace in GRACES:
        began = time.monotonic()
        outcome = attempt()
        took = time.monotonic() - began
        if took <= limit + grace:
            return outcome
    raise AssertionError(f"it took {took} s, with a limit of {limit} s")


def test_code_that_goes_on(server: E2BServer, session: E2BSession) -> None:
    def attempt() -> Execution:
        session.run("x = 1")
        return session.run("print('begun', flush=True)\nwhile True: pass", timeout=0.5)

    execution = within_its_time(attempt, 0.5)
    assert isinstance(execution, Execution)
    assert (execution.status, execution.stdout) == ("timeout", "begun\n")
    assert report(execution).startswith("begun\nStopped after 0.5 s. Variables and files")
    # The SDK alone would hang in the next call.
    assert within_its_time(lambda: session.run("'x' in dir()", timeout=20).result, 10) == "False"
    until(lambda: len(server.sandboxes) == 1)


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_server_that_stalls_or_drips(server: E2BServer, session: E2BSession, fault: str) -> None:
    def attempt() -> Execution:
        server.fault = fault
        return session.run("1", timeout=0.5)

    execution = within_its_time(attempt, 0.5)
    assert isinstance(execution, Execution)
    assert execution.status == "timeout"
    assert session.run("1").result == "1"


def test_a_server_that_never_answers_is_not_the_codes_fault(server: E2BServer, session: E2BSession) -> None:
    def attempt() -> None:
        server.fault = "stall before the head"
        with pytest.raises(SandboxGoneError, match=r"did not answer within 0.5 s"):
            session.run("1", timeout=0.5)

    within_its_time(attempt, 0.5)
    assert session.run("1").result == "1"


def test_a_sandbox_that_comes_too_late_is_killed(server: E2BServer) -> None:
    server.create_fault, server.stall_seconds = "stall", 0.6
    with E2BSandbox(LIMITS, open_seconds=0.3) as sandbox:
        with pytest.raises(SandboxGoneError, match=r"no sandbox within 0.3 s"):
            sandbox.open()
        until(lambda: server.made == 1 or server.requests.count(("POST", "/v2/sandboxes")) > 1)
    until(lambda: server.sandboxes == {})


# --- a service that fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "cut between lines", "500", "401"])
def test_a_call_that_is_cut_off(server: E2BServer, session: E2BSession, fault: str) -> None:
    session.run("x = 1")
    server.fault = fault
    with pytest.raises(SandboxGoneError):
        session.run("x")
    assert "NameError" in session.run("x").traceback
    until(lambda: len(server.sandboxes) == 1)


def test_a_server_that_dies_in_mid_call(server: E2BServer, session: E2BSession) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(session.run, "import time; time.sleep(60)")
        until(lambda: started(server))
        server.die()
        with pytest.raises(SandboxGoneError):
            call.result(timeout=15)
    with pytest.raises(SandboxGoneError, match="can't be reached"):
        session.run("1")
    back = E2BServer(server.server_address[1])
    try:
        assert session.run("2").result == "2"
    finally:
        back.stop()


def test_a_server_that_is_away_between_calls_finds_the_session_again(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    server.die()
    with pytest.raises(SandboxGoneError, match="the code did not run"):
        session.run("x = 8")
    back = E2BServer(server.server_address[1])
    back.sandboxes = server.sandboxes
    try:
        assert session.run("x").result == "7"
    finally:
        back.stop()


def test_a_paused_sandbox_goes_on_where_it_was(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    only(server).paused = True
    assert session.run("x").result == "7"


def test_a_sandbox_that_ended_between_calls(server: E2BServer, session: E2BSession) -> None:
    session.run("x = 7")
    server.remove(only(server))
    execution = session.run("x")
    assert execution.status == "killed"
    assert report(execution) == (
        "The sandbox had ended before this call, so the code did not run. "
        "Variables and files of earlier calls are gone."
    )
    assert "NameError" in session.run("x").traceback


def test_a_sandbox_that_ends_under_a_call(server: E2BServer, session: E2BSession) -> None:
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(session.run, "import time; time.sleep(60)")
        until(lambda: started(server))
        server.remove(only(server))
        assert call.result(timeout=15).status == "killed"
    assert session.run("1").result == "1"


def test_its_end_is_put_off(server: E2BServer, session: E2BSession, monkeypatch: pytest.MonkeyPatch) -> None:
    from metis_agent.tools.sandboxes.e2b import service

    remote = only(server)
    assert 800 < remote.ends - time.monotonic() <= 900
    session.run("x = 7")
    extend = ("POST", f"/sandboxes/{remote.id}/timeout")
    assert extend not in server.requests
    monkeypatch.setattr(service, "_EXTEND_EVERY", 0.0)
    remote.extend(5)
    assert session.run("x").result == "7"
    assert extend in server.requests
    assert 800 < remote.ends - time.monotonic() <= 900
    remote.extend(-1)
    assert session.run("x").status == "killed"


def test_a_busy_service_is_asked_again(server: E2BServer, sandbox: E2BSandbox) -> None:
    server.create_fault = "503"
    with sandbox.open() as session:
        assert session.run("1").result == "1"
    server.create_fault = "500"
    with pytest.raises(SandboxGoneError, match="500"):
        sandbox.open()
