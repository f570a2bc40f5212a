"""E2B's real client against a server on this machine that speaks its protocol and runs the code for real."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_agent.errors import (
    ConfigurationError,
    InputError,
    MissingDependencyError,
    SandboxUnavailableError,
)
from metis_agent.tools.python import report
from metis_agent.tools.sandboxes import E2BSandbox, E2BSession, Execution, Sandbox
from metis_agent.tools.sandboxes.inside.wire import MAX_CODE_BYTES

from ..e2b_server import KEY, E2BServer
from .watching import GRACES, LIMITS

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


# --- what it is for --------------------------------------------------------------------------------------------------


def test_state_lasts_in_a_session_and_never_crosses_to_another(sandbox: E2BSandbox, session: E2BSession) -> None:
    assert isinstance(sandbox, Sandbox)
    assert session.run("x = 41\nopen('note', 'w').write('mine')").ok
    assert session.run("print('seen')\nx + 1").result == "42"
    with sandbox.open() as other:
        assert "NameError" in other.run("x").traceback
        assert "FileNotFoundError" in other.run("open('note')").traceback
    assert session.run("open('note').read()").result == "mine"


def test_what_it_says(session: E2BSession) -> None:
    execution = session.run("import sys\nprint('out')\nprint('err', file=sys.stderr)\n[1, 2]")
    assert (execution.status, execution.stdout, execution.stderr) == ("ok", "out\n", "err\n")
    assert (execution.result, execution.truncated) == ("[1, 2]", False)
    assert 0 < execution.seconds < 20
    assert report(execution) == "out\nstderr:\nerr\n[1, 2]"
    assert session.run("None").result is None
    assert session.run("display({'a': 1})").stdout == "{'a': 1}\n"


def test_errors_in_words(session: E2BSession) -> None:
    execution = session.run("print('begun')\n1 / 0")
    assert (execution.status, execution.stdout) == ("error", "begun\n")
    assert execution.traceback.endswith("ZeroDivisionError: division by zero")
    assert "\x1b" not in execution.traceback
    assert not execution.state_lost
    assert "Nothing can be installed here" in report(session.run("import absent_package"))
    assert "SyntaxError" in session.run("a b").traceback
    long = session.run("raise ValueError('x' * 100_000 + 'the end')")
    assert long.truncated
    assert len(long.traceback) == 4096
    assert long.traceback.endswith("the end")


def test_text_of_any_kind(session: E2BSession) -> None:
    # httpx takes some of these for the end of a line.
    odd = "a\x85b\u2028c\u2029d\x0be\x1cf é 東京 \U0001f600"
    assert session.run(f"print({odd!r})").stdout == odd + "\n"
    assert session.run("print('\ud800')").stdout == "?\n"
    cut = session.run("print('é' * 4096)")
    assert (cut.stdout, cut.truncated) == ("é" * 2048, True)
    with pytest.raises(InputError, match="bytes long"):
        session.run("#" * (MAX_CODE_BYTES + 1))
    with pytest.raises(ConfigurationError, match="timeout=0"):
        session.run("1", timeout=0)


def test_a_process_that_ends(session: E2BSession) -> None:
    session.run("x = 1")
    execution = session.run("import os\nprint('begun', flush=True)\nimport time; time.sleep(0.1)\nos._exit(1)")
    assert (execution.status, execution.stdout) == ("killed", "begun\n")
    assert "Variables and files of earlier calls are gone." in report(execution)
    assert "NameError" in session.run("x").traceback


def test_calls_of_several_threads_come_one_after_another(session: E2BSession) -> None:
    session.run("inside, most = 0, 0\nimport time")
    code = "inside += 1\nmost = max(most, inside)\ntime.sleep(0.05)\ninside -= 1"
    with ThreadPoolExecutor(4) as threads:
        assert all(execution.ok for execution in threads.map(session.run, [code] * 4))
    assert session.run("most").result == "1"


# --- floods and forgeries --------------------------------------------------------------------------------------------


def test_one_message_of_40_mb(session: E2BSession) -> None:
    execution = session.run("print('x' * 40_000_000)", timeout=60)
    assert execution.status == "killed"
    assert "more than 16 MB of output" in execution.reason
    assert session.run("1").result == "1"


def test_many_messages(server: E2BServer, session: E2BSession) -> None:
    execution = session.run(
        "import sys\nfor _ in range(100):\n    print('x' * 20_000)\n    sys.stderr.write('y' * 20_000)"
    )
    assert (execution.status, execution.truncated) == ("ok", True)
    assert (execution.stdout, execution.stderr) == ("x" * 4096, "y" * 4096)
    server.sent = 0
    flood = session.run("while True:\n    print('x' * 1_000_000)\n    import time; time.sleep(0.02)")
    assert (flood.status, flood.stdout, flood.truncated) == ("killed", "x" * 4096, True)
    # What is on its way is lost; no more than that was taken.
    assert server.sent < 40_000_000
    assert session.run("1").result == "1"


def test_a_flood_does_not_delay_other_sessions(sandbox: E2BSandbox, session: E2BSession) -> None:
    with sandbox.open() as other, ThreadPoolExecutor(1) as threads:

        def attempt() -> Execution:
            flood = threads.submit(session.run, "print('x' * 40_000_000)")
            execution = other.run("while True: pass", timeout=0.5)
            flood.result()
            return execution

        for grace in GRACES:
            execution = attempt()
            if execution.seconds < 0.5 + grace:
                break
        assert execution.status == "timeout"
        assert execution.seconds < 0.5 + grace


@pytest.mark.parametrize("fault", ["no JSON", "no object", "no text", "no image", "deep"])
def test_answers_that_are_none(server: E2BServer, session: E2BSession, fault: str) -> None:
    server.fault = fault
    execution = session.run("1")
    assert execution.status == "killed"
    assert "broke the protocol" in execution.reason
    assert session.run("1").result == "1"


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_wrong_key(server: E2BServer) -> None:
    with E2BSandbox(LIMITS, api_key="e2b_wrong_but_secret") as sandbox:
        with pytest.raises(SandboxUnavailableError, match=r"refused the key.*401.*Set E2B_API_KEY") as caught:
            sandbox.open()
        assert "wrong_but_secret" not in str(caught.value)
        assert "wrong_but_secret" not in repr(sandbox._service.settings)


def test_no_key_and_no_sdk(server: E2BServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_API_KEY")
    with pytest.raises(ConfigurationError, match="E2B_API_KEY is not set"):
        E2BSandbox()
    with pytest.raises(ConfigurationError, match=r"lifetime=0"):
        E2BSandbox(api_key=KEY, lifetime=0)
    with pytest.raises(ConfigurationError, match=r"lifetime=30"), E2BSandbox(api_key=KEY, lifetime=30) as sandbox:
        sandbox.open()
    monkeypatch.delitem(sys.modules, "metis_agent.tools.sandboxes.e2b.service")
    monkeypatch.setitem(sys.modules, "e2b", None)
    with pytest.raises(MissingDependencyError, match=r"langgraph-metis\[e2b\]"):
        E2BSandbox(api_key=KEY)


def test_the_key_never_enters_a_sandbox(server: E2BServer, session: E2BSession) -> None:
    session.run("1")
    assert server.in_sandbox_headers
    assert KEY not in str(server.in_sandbox_headers)
    assert KEY not in str(session.run("import os; print(dict(os.environ))"))


def test_debug_mode_does_not_make_sessions_share(
    server: E2BServer, sandbox: E2BSandbox, session: E2BSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2B_DEBUG", "true")
    session.run("x = 1")
    with sandbox.open() as other:
        assert "NameError" in other.run("x").traceback
    assert server.made == 2
