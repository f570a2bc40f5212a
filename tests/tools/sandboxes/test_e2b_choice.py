"""E2B as the first choice where a key is set: its self-test, its place in the order, and the `python` tool on it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from metis_agent.cli import doctor
from metis_agent.errors import ConfigurationError, SandboxUnavailableError
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes import E2BSandbox, Sandbox, SandboxLimits, diagnose, open_sandbox
from metis_agent.tools.sandboxes.choose import failures
from metis_agent.tools.sandboxes.inside.linux import supported_abi

from .e2b_server import E2BServer

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
# The server runs code on this machine; only behind Landlock is that like another one.
apart = pytest.mark.skipif(supported_abi() < 4, reason="needs Landlock with rules for TCP")


@pytest.fixture
def tool(server: E2BServer) -> Iterator[PythonTool]:
    with E2BSandbox(SandboxLimits(seconds=20)) as sandbox:
        tool = PythonTool(sandbox=sandbox)
        yield tool
        tool.close()


def thread(name: str):
    return {"configurable": {"thread_id": name}}


def said(tool: PythonTool, code: str, conversation: str) -> str:
    return tool.invoke({"code": code}, thread(conversation))


@apart
def test_the_self_test_finds_nothing(server: E2BServer) -> None:
    with E2BSandbox() as sandbox:
        assert failures(sandbox) == []


def test_the_self_test_finds_this_machine(server: E2BServer) -> None:
    # The server then contains nothing.
    with E2BSandbox(internet=True) as sandbox:
        assert failures(sandbox) == [
            "code in it read a file of this machine",
            "code in it wrote a file of this machine",
        ]


@apart
def test_it_comes_first(server: E2BServer) -> None:
    for backend in ("auto", "e2b"):
        with open_sandbox(backend=backend) as sandbox:
            assert sandbox.name == "E2B"
            with sandbox.open() as session:
                assert session.run("6 * 7").result == "42"
    assert PythonTool().check() == "E2B"


def test_without_a_key_it_is_passed_over(server: E2BServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_API_KEY")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_sandbox() as chosen:
            assert chosen.name != "E2B"
    with pytest.raises(SandboxUnavailableError, match="e2b: E2B_API_KEY is not set"):
        open_sandbox(backend="e2b")
    assert server.requests == []


def test_a_wrong_key_is_said(server: E2BServer, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2B_API_KEY", "e2b_wrong_but_secret")
    with pytest.warns(RuntimeWarning, match=r"E2B does not work: E2B refused the key.*instead"):
        chosen = open_sandbox()
    assert chosen.name != "E2B"
    chosen.close()
    with pytest.raises(SandboxUnavailableError, match="refused the key"):
        open_sandbox(backend="e2b")


def test_diagnosis(server: E2BServer, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = diagnose()[0]
    assert (offline.backend, offline.works, offline.problems) == ("e2b", False, ("not tried: that needs the network",))
    assert server.requests == []
    monkeypatch.setenv("E2B_API_KEY", "e2b_wrong_but_secret")
    online = diagnose(online=True)[0]
    assert not online.works
    assert "refused the key" in online.problems[0]


def test_the_doctor(server: E2BServer, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = {check.name: check for check in [*doctor._sandboxes(online=False), doctor._extra("e2b")]}
    assert checks["sandbox e2b"].status == "absent"
    assert "metis doctor --online" in checks["sandbox e2b"].remedy
    assert checks["extra e2b"].status == "ok"
    if checks["python tool"].status == "ok":
        assert checks["python tool"].detail.startswith("tries E2B first, as its key is set; else runs code in ")
    assert server.requests == []
    monkeypatch.setenv("E2B_API_KEY", "e2b_wrong_but_secret")
    check = next(check for check in doctor._sandboxes(online=True) if check.name == "sandbox e2b")
    assert (check.status, check.core) == ("broken", False)
    assert "refused the key" in check.detail


def test_the_tool_keeps_conversations_apart(server: E2BServer, tool: PythonTool) -> None:
    said(tool, "secret = 'of a'", "a")
    assert said(tool, "secret", "a") == "of a"
    assert "NameError" in said(tool, "secret", "b")
    assert len(server.sandboxes) == 2
    tool.close()
    while server.sandboxes:
        pass


async def test_the_tool_in_async_code(server: E2BServer, tool: PythonTool) -> None:
    await tool.ainvoke({"code": "x = 20"}, thread("a"))
    assert await tool.ainvoke({"code": "x + 1"}, thread("a")) == "21"


def test_the_tool_shows_images(server: E2BServer, tool: PythonTool) -> None:
    pytest.importorskip("PIL")
    content = tool.invoke({"code": "from PIL import Image\nImage.new('RGB', (6, 4), 'red')"}, thread("a"))
    assert [block["type"] for block in content] == ["text", "image"]
    assert content[1]["mime_type"] == "image/png"


def test_an_unknown_backend_is_still_unknown(server: E2BServer) -> None:
    with pytest.raises(ConfigurationError, match="backend='e2'"):
        open_sandbox(backend="e2")  # type: ignore[arg-type]
