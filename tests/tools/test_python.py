"""The `python` tool: LangChain's own suites, its words, its sessions, and what it raises."""

from __future__ import annotations

import asyncio
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

from metis_agent.errors import ConfigurationError, SandboxGoneError, SandboxUnavailableError
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes import (
    Execution,
    Sandbox,
    SandboxLimits,
    UnsafeSandbox,
    UnsafeSandboxWarning,
)


def call(code: str) -> dict[str, Any]:
    return {"name": "python", "args": {"code": code}, "id": "call-1", "type": "tool_call"}


def thread(name: str) -> dict[str, Any]:
    return {"configurable": {"thread_id": name}}


class TestUnit(ToolsUnitTests):
    @property
    def tool_constructor(self) -> type[BaseTool]:
        return PythonTool

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"code": "1 + 1"}


class TestIntegration(ToolsIntegrationTests):
    @pytest.fixture
    def tool(self, sandbox: Sandbox) -> Iterator[PythonTool]:
        tool = PythonTool(sandbox=sandbox)
        yield tool
        tool.close()

    @property
    def tool_constructor(self) -> type[BaseTool]:
        return PythonTool

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"code": "1 + 1"}


def test_what_a_model_sees() -> None:
    tool = PythonTool(limits=SandboxLimits(seconds=5))
    assert tool.name == "python"
    assert list(tool.args) == ["code"]
    assert "5 seconds" in tool.description
    assert PythonTool(description="Mine.").description == "Mine."


def test_making_one_starts_nothing() -> None:
    began = time.thread_time()
    tool = PythonTool()
    assert time.thread_time() - began < 0.1
    assert tool._parts.sandbox._own is None
    tool.close()


def test_success(tool: PythonTool) -> None:
    message = tool.invoke(call("print('a')\n1 + 1"))
    assert isinstance(message, ToolMessage)
    assert (message.content, message.status, message.tool_call_id) == ("a\n2", "success", "call-1")
    assert isinstance(message.artifact, Execution)
    assert message.artifact.result == "2"
    assert tool.invoke({"code": "1 + 1"}) == "2"
    assert tool.invoke("1 + 1") == "2"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("import os\nos._exit(3)", "killed", "The process ended"),
        ("x = (", "error", "SyntaxError"),
        pytest.param("#" * 2_000_000, "error", "at most 1048576", id="too long"),
        ("import socket\nsocket.socket()", "error", "has no network"),
        ("!pip install numpy", "error", "write plain Python"),
        ("bytearray(10**12)", "error", "memory limit"),
    ],
)
async def test_failure_is_a_readable_result(tool: PythonTool, code: str, status: str, words: str) -> None:
    for message in (tool.invoke(call(code)), await tool.ainvoke(call(code))):
        assert message.status == "error"
        assert message.artifact.status == status
        assert words in message.content
        assert message.name == "python"
    assert words in tool.invoke({"code": code})


def test_timeout(sandbox: Sandbox) -> None:
    tool = PythonTool(sandbox=sandbox, limits=SandboxLimits(seconds=0.3))
    message = tool.invoke(call("print('half')\nwhile True: pass"), thread("t"))
    assert message.status == "error"
    assert message.content.startswith("half\nStopped after 0.3 s.")
    assert tool.invoke(call("1 + 1"), thread("t")).content == "2"
    tool.close()


def test_fences_are_unwrapped(tool: PythonTool) -> None:
    assert tool.invoke({"code": "```python\n40 + 2\n```"}) == "42"


def test_nothing_printed(tool: PythonTool) -> None:
    assert tool.invoke({"code": "x = 1"}).startswith("The code ran but printed nothing")


async def test_a_thread_keeps_its_names(tool: PythonTool) -> None:
    tool.invoke(call("x = 41"), thread("one"))
    assert tool.invoke(call("x + 1"), thread("one")).content == "42"
    assert (await tool.ainvoke(call("x + 2"), thread("one"))).content == "43"
    assert "NameError" in tool.invoke(call("x"), thread("two")).content
    assert len(tool._parts.pool) == 2


def test_calls_outside_of_a_graph_share_nothing(tool: PythonTool) -> None:
    tool.invoke(call("x = 1"))
    assert "NameError" in tool.invoke(call("x")).content
    assert len(tool._parts.pool) == 0


def graph_of(tool: PythonTool, *codes: str) -> Any:
    """Each code is one step of a run."""
    graph = StateGraph(MessagesState)
    before = START
    for number, code in enumerate(codes):

        def ask(state: MessagesState, code: str = code, number: int = number) -> dict[str, Any]:
            return {"messages": [AIMessage("", tool_calls=[call(code) | {"id": f"{number}"}])]}

        graph.add_node(f"ask{number}", ask).add_node(f"act{number}", ToolNode([tool]))
        graph.add_edge(before, f"ask{number}").add_edge(f"ask{number}", f"act{number}")
        before = f"act{number}"
    return graph


def last(state: dict[str, Any]) -> str:
    return str(state["messages"][-1].content)


async def test_a_run_without_a_thread_keeps_its_names_to_itself(tool: PythonTool) -> None:
    graph = graph_of(tool, "x = 41", "x + 1").compile()
    assert last(graph.invoke({"messages": []})) == "42"
    assert last(await graph.ainvoke({"messages": []})) == "42"
    later = graph_of(tool, "x").compile()
    assert "NameError" in last(later.invoke({"messages": []}))
    assert "NameError" in last(await later.ainvoke({"messages": []}))


async def test_runs_at_the_same_time_share_nothing(tool: PythonTool) -> None:
    graph = graph_of(tool, "'x' in globals()", "x = 1\n'x' in globals()").compile()
    states = await asyncio.gather(*(graph.ainvoke({"messages": []}) for _ in range(10)))
    for state in states:
        assert [m.content for m in state["messages"] if isinstance(m, ToolMessage)] == ["False", "True"]


def test_a_thread_of_a_graph_lasts_over_runs(tool: PythonTool) -> None:
    saver = InMemorySaver()
    graph_of(tool, "x = 41").compile(checkpointer=saver).invoke({"messages": []}, thread("g"))
    state = graph_of(tool, "x + 1").compile(checkpointer=saver).invoke({"messages": []}, thread("g"))
    assert last(state) == "42"


async def test_the_event_loop_goes_on(tool: PythonTool) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    code = "import time\nbegan = time.monotonic()\ntime.sleep(0.2)\nprint(began, time.monotonic())"
    printed = await asyncio.gather(*(tool.ainvoke({"code": code}) for _ in range(10)))
    ticking.cancel()
    spans = sorted(tuple(map(float, line.split())) for line in printed)
    assert any(later[0] < earlier[1] for earlier, later in pairwise(spans))  # not one after another
    assert ticks >= 10


async def test_cancelling_ends_the_code(tool: PythonTool) -> None:
    began = time.monotonic()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(tool.ainvoke(call("while True: pass"), thread("c")), 0.3)
    assert time.monotonic() - began < 8  # of 10 that a call may take
    assert (await tool.ainvoke(call("1 + 1"), thread("c"))).content == "2"


def test_sessions_are_limited(sandbox: Sandbox) -> None:
    tool = PythonTool(sandbox=sandbox, max_sessions=2)
    for name in "abc":
        tool.invoke(call(f"x = '{name}'"), thread(name))
    assert len(tool._parts.pool) == 2
    assert "NameError" in tool.invoke(call("x"), thread("a")).content
    assert tool.invoke(call("x"), thread("c")).content == "'c'"
    tool.close()


def test_idle_sessions_go(sandbox: Sandbox) -> None:
    tool = PythonTool(sandbox=sandbox, idle_seconds=0.1)
    tool.invoke(call("x = 1"), thread("a"))
    deadline = time.monotonic() + 5
    while len(tool._parts.pool) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(tool._parts.pool) == 0


def test_closed_and_used_again(tool: PythonTool) -> None:
    tool.invoke(call("x = 1"), thread("a"))
    tool.close()
    assert "NameError" in tool.invoke(call("x"), thread("a")).content


def test_the_own_sandbox_is_opened_late_and_closed() -> None:
    tool = PythonTool()
    try:
        name = tool.check()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    assert "seccomp" in name
    own = tool._parts.sandbox._own
    assert own is not None
    assert tool.invoke({"code": "1 + 1"}) == "2"
    tool.close()
    with pytest.raises(SandboxGoneError):
        own.open()
    assert tool.invoke({"code": "1 + 1"}) == "2"
    tool.close()


def test_check_finds_a_sandbox_that_does_not_hold() -> None:
    with pytest.warns(UnsafeSandboxWarning):
        sandbox = UnsafeSandbox(allow_unsafe=True)
    with pytest.raises(SandboxUnavailableError, match="'no containment' does not hold: code in it read"):
        PythonTool(sandbox=sandbox).check()


@pytest.mark.skipif(sys.platform != "linux", reason="another message elsewhere")
async def test_no_sandbox_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("metis_agent.tools.sandboxes.local.supported_abi", lambda: 0)
    tool = PythonTool()
    with pytest.raises(SandboxUnavailableError, match="apt-get install bubblewrap"):
        tool.check()
    with pytest.raises(SandboxUnavailableError):
        tool.invoke(call("1"))
    with pytest.raises(SandboxUnavailableError):
        await tool.ainvoke(call("1"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_sessions": 0}, "max_sessions=0"),
        ({"idle_seconds": -1}, "idle_seconds=-1"),
        ({"backend": "docker"}, "backend='docker'"),
        ({"backend": "unsafe"}, "allow_unsafe=False"),
        ({"limits": {"seconds": 5}}, r"limits=\{'seconds': 5\}"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        PythonTool(**arguments)


def test_a_sandbox_and_a_backend(sandbox: Sandbox) -> None:
    with pytest.raises(ConfigurationError, match="leave the other two out"):
        PythonTool(sandbox=sandbox, backend="landlock")


@pytest.mark.parametrize(
    "copied",
    [
        lambda tool: tool.model_copy(update={"description": "Other."}),
        lambda tool: tool.model_copy(deep=True),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_copies(sandbox: Sandbox, copied: Callable[[PythonTool], PythonTool]) -> None:
    """LangChain copies tools, for another description say; a copy uses the same sessions, and outlives the first."""
    first = PythonTool(limits=sandbox.limits)
    second = copied(first)
    first.invoke(call("x = 1"), thread("a"))
    del first
    gc.collect()
    assert second.invoke(call("x"), thread("a")).content == "1"
    assert second.invoke(call("2"), thread("b")).content == "2"
    second.close()
