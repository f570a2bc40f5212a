import asyncio
import random
import threading
import time
from contextlib import suppress
from decimal import Decimal
from typing import Annotated, Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, InjectedToolCallId, Tool, ToolException, tool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode, ToolRuntime
from langgraph.types import Command, interrupt
from pydantic import BaseModel, ValidationError

from metis_agent.errors import ConfigurationError, SandboxGoneError
from metis_agent.rules.budget import terms_of
from metis_agent.tools.instrumented import InstrumentedTool, ToolUsage, UsageMeter
from metis_agent.tools.proxy import ProxyTool, ResultCache
from metis_agent.tools.redaction import REDACTED, Redactor
from metis_agent.tools.search import SearchHit
from metis_agent.tools.text_search import TextSearchTool

SECRET = "opensesame"


@tool
def double(number: int, times: int = 1) -> str:
    """Double a number."""
    return str(number * 2**times)


class Scripted(BaseTool):
    """Does what it is told, one thing after the other; the last for ever."""

    name: str = "scripted"
    description: str = "Scripted."
    script: list[Any]
    calls: int = 0

    def _run(self, x: str = "") -> Any:
        step = self.script[min(self.calls, len(self.script) - 1)]
        self.calls += 1
        if callable(step):
            step = step()
        if isinstance(step, Exception):
            raise step
        return step


def call(tool, id="c1", **args):
    return tool.invoke({"type": "tool_call", "id": id, "name": tool.name, "args": args})


async def acall(tool, id="c1", **args):
    return await tool.ainvoke({"type": "tool_call", "id": id, "name": tool.name, "args": args})


def in_graph(tool, **args):
    graph = StateGraph(MessagesState)
    graph.add_node("tools", ToolNode([tool]))
    graph.add_edge(START, "tools")
    asked = {"type": "tool_call", "id": "c1", "name": tool.name, "args": args}
    return graph.compile(), {"messages": [AIMessage("", tool_calls=[asked])]}


class _Suite:
    @property
    def tool_constructor(self):
        return InstrumentedTool

    @property
    def tool_constructor_params(self):
        return {"tool": double, "timeout": 5.0, "cache": ResultCache(), "redactor": Redactor()}

    @property
    def tool_invoke_params_example(self):
        return {"number": 3}


class TestUnit(_Suite, ToolsUnitTests):
    pass


class TestIntegration(_Suite, ToolsIntegrationTests):
    pass


# --- the same tool ---------------------------------------------------------------------------------------------------


async def test_it_looks_and_answers_like_the_tool():
    metered = InstrumentedTool(double)
    assert (metered.name, metered.description) == (double.name, double.description)
    assert metered.tool_call_schema.model_json_schema() == double.tool_call_schema.model_json_schema()
    assert metered.args == double.args
    assert call(metered, number=3) == call(double, number=3) == await acall(metered, number=3)
    assert metered.invoke({"number": 3, "times": 2}) == await metered.ainvoke({"number": 3, "times": 2}) == "12"
    assert InstrumentedTool(InstrumentedTool(double, timeout=5)).invoke({"number": 3}) == "6"


async def test_a_tool_of_one_string_and_async_only_tools():
    shout = InstrumentedTool(Tool(name="shout", description="Shout.", func=str.upper), timeout=5)
    assert shout.invoke("hey") == await shout.ainvoke("hey") == "HEY"

    @tool
    async def only_async(x: int) -> str:
        """Async."""
        return str(x)

    metered = InstrumentedTool(only_async, timeout=5)
    assert await metered.ainvoke({"x": 1}) == metered.invoke({"x": 1}) == "1"
    twice = InstrumentedTool(ProxyTool(only_async), timeout=5)
    assert await twice.ainvoke({"x": 2}) == await asyncio.to_thread(twice.invoke, {"x": 2}) == "2"


async def test_content_and_artifact():
    class Backend:
        def search(self, query, limit):
            return [SearchHit(text=query)]

    plain = TextSearchTool(backend=Backend())
    metered = InstrumentedTool(plain, timeout=5)
    assert call(metered, query="x") == call(plain, query="x")
    assert (await acall(metered, query="x")).artifact[0]["text"] == "x"


async def test_config_and_injected_arguments_are_handed_through():
    @tool
    def told(
        x: int,
        runtime: ToolRuntime,
        call_id: Annotated[str, InjectedToolCallId],
        state: Annotated[dict, InjectedState],
        config: RunnableConfig,
    ) -> str:
        """Say what was injected."""
        return f"{x} {runtime.tool_call_id} {call_id} {len(state['messages'])} {config['configurable']['name']}"

    metered = InstrumentedTool(told, timeout=5)
    assert set(metered.args) == {"x"}
    graph, given = in_graph(metered, x=3)
    config = {"configurable": {"name": "n"}}
    assert graph.invoke(given, config)["messages"][-1].content == "3 c1 c1 1 n"
    assert (await graph.ainvoke(given, config))["messages"][-1].content == "3 c1 c1 1 n"


def test_commands_and_interrupts_pass():
    @tool
    def commands(call_id: Annotated[str, InjectedToolCallId]) -> Command:
        """Command."""
        return Command(update={"messages": [ToolMessage("by command", tool_call_id=call_id)]})

    graph, given = in_graph(InstrumentedTool(commands, timeout=5, redactor=Redactor()))
    assert graph.invoke(given)["messages"][-1].content == "by command"

    asked = InstrumentedTool(Scripted(script=[lambda: interrupt("may I?")]), timeout=5, retries=3, idempotent=True)
    graph, given = in_graph(asked)
    assert graph.invoke(given)["__interrupt__"][0].value == "may I?"
    assert asked.tool.calls == 1


def test_arguments_that_do_not_fit():
    with pytest.raises(ValidationError):
        call(InstrumentedTool(double), number="many")


# --- time ------------------------------------------------------------------------------------------------------------


async def test_a_call_that_hangs_is_left_behind():
    end = threading.Event()
    metered, began = InstrumentedTool(Scripted(script=[lambda: end.wait(20)]), timeout=0.1), time.perf_counter()
    for message in (call(metered), await acall(metered)):
        assert message.status == "error"
        assert message.content == "scripted gave no result within 0.1 seconds and was abandoned."
    many = await asyncio.gather(*(acall(metered) for _ in range(40)))
    assert all(message.status == "error" for message in many)
    assert time.perf_counter() - began < 10
    assert metered.usage.timeouts == metered.usage.calls == 42
    end.set()


async def test_async_code_is_cancelled():
    cancelled = []

    @tool
    async def sleeps(x: int) -> str:
        """Sleep."""
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            cancelled.append(x)
            raise
        return ""

    assert "within" in (await acall(InstrumentedTool(sleeps, timeout=0.05), x=1)).content
    assert cancelled == [1]


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_what_is_idempotent_is_tried_again(timeout):
    for run in (lambda metered: metered.invoke({}), lambda metered: asyncio.run(metered.ainvoke({}))):
        metered = InstrumentedTool(
            Scripted(script=[OSError("1"), OSError("2"), "ok"]), retries=2, idempotent=True, cost=0.5, timeout=timeout
        )
        assert await asyncio.to_thread(run, metered) == "ok"
        assert (metered.usage.calls, metered.usage.ok, metered.usage.retries, metered.usage.cost) == (1, 1, 2, 1.5)


def test_the_last_error_is_raised_as_it_is():
    metered = InstrumentedTool(Scripted(script=[OSError("1"), OSError("2")]), retries=1, idempotent=True)
    with pytest.raises(OSError, match="2"):
        metered.invoke({})
    assert metered.usage.errors == 1


@pytest.mark.parametrize("error", [ToolException("no"), SandboxGoneError("gone")])
def test_what_is_final_is_not_tried_again(error):
    metered = InstrumentedTool(Scripted(script=[error]), retries=3, idempotent=True)
    if isinstance(error, ToolException):
        assert (call(metered).status, call(metered).content) == ("error", "no")
    else:
        with pytest.raises(SandboxGoneError):
            metered.invoke({})
    assert metered.tool.calls == metered.usage.errors


def test_retries_end_with_the_time():
    def fails():
        time.sleep(0.1)
        raise OSError

    metered, began = (
        InstrumentedTool(Scripted(script=[fails]), retries=99, idempotent=True, timeout=0.5),
        time.perf_counter(),
    )
    with suppress(OSError):
        call(metered)
    assert time.perf_counter() - began < 5
    assert metered.tool.calls < 6


# --- cache -----------------------------------------------------------------------------------------------------------


async def test_a_group_makes_the_same_call_once():
    cache = ResultCache()
    tools = [InstrumentedTool(Scripted(script=[lambda: time.sleep(0.05) or "found"]), cache=cache) for _ in range(4)]
    answers = await asyncio.gather(*(acall(tool, id=f"c{i}", x="a") for i, tool in enumerate(tools * 2)))
    assert [answer.content for answer in answers] == ["found"] * 8
    assert [answer.tool_call_id for answer in answers] == [f"c{i}" for i in range(8)]
    assert sum(tool.tool.calls for tool in tools) == 1
    assert sum(tool.usage.cached for tool in tools) == 7
    assert tools[0].invoke({"x": "a"}) == "found"
    assert sum(tool.tool.calls for tool in tools) == 1


def test_other_arguments_are_another_call():
    metered = InstrumentedTool(Scripted(script=["one", "two"]), cache=ResultCache())
    assert [metered.invoke({"x": x}) for x in "aba"] == ["one", "two", "one"]


def test_failures_and_answers_to_one_call_are_not_kept():
    message = ToolMessage("m", tool_call_id="c1", status="error")
    metered = InstrumentedTool(Scripted(script=[ToolException("down"), message, "ok", "never"]), cache=ResultCache())
    assert [call(metered).content for _ in range(4)] == ["down", "m", "ok", "ok"]


def test_what_was_kept_can_not_be_changed_by_who_gets_it():
    metered = InstrumentedTool(Scripted(script=[[{"type": "text", "text": "a"}]]), cache=ResultCache())
    call(metered)
    call(metered).content.append("mine")
    assert call(metered).content == [{"type": "text", "text": "a"}]


def test_an_argument_without_a_canonical_form_is_not_cached():
    class Point(BaseModel):
        x: int

    @tool
    def takes(thing: Any) -> str:
        """Take."""
        return str(random.random())

    metered = InstrumentedTool(takes, cache=ResultCache())
    assert metered.invoke({"thing": object()}) != metered.invoke({"thing": object()})
    assert metered.invoke({"thing": Point(x=1)}) == metered.invoke({"thing": Point(x=1)})


# --- secrets ---------------------------------------------------------------------------------------------------------


class Tracer(BaseCallbackHandler):
    def __init__(self):
        self.seen = []

    def on_tool_start(self, serialized, input_str, **kwargs):
        self.seen.append("start")

    def on_tool_end(self, output, **kwargs):
        self.seen.append(str(output))

    def on_tool_error(self, error, **kwargs):
        self.seen.append(repr(error))


@pytest.mark.parametrize(
    "step", [f"key {SECRET}", [{"type": "text", "text": SECRET}], ToolException(SECRET), OSError(SECRET)]
)
async def test_secrets_reach_neither_message_nor_tracer(step):
    for run in (call, acall):
        tracer = Tracer()
        metered = InstrumentedTool(Scripted(script=[step], callbacks=[tracer]), redactor=Redactor(secrets=[SECRET]))
        message = run(metered)
        message = await message if run is acall else message
        assert REDACTED in str(message.content)
        assert SECRET not in str(message) + str(tracer.seen)
        assert len(tracer.seen) == 2  # one run, not one in another


def test_secrets_leave_the_artifact():
    class WithArtifact(Scripted):
        response_format: str = "content_and_artifact"

    metered = InstrumentedTool(
        WithArtifact(script=[(SECRET, {"raw": [SECRET]})]), redactor=Redactor(secrets=[SECRET]), cache=ResultCache()
    )
    for _ in range(2):
        message = call(metered)
        assert (message.content, message.artifact) == (REDACTED, {"raw": [REDACTED]})


def test_an_error_without_a_secret_is_the_tools_own():
    with pytest.raises(OSError, match="plain"):
        InstrumentedTool(Scripted(script=[OSError("plain")]), redactor=Redactor()).invoke({})


# --- accounting ------------------------------------------------------------------------------------------------------


def test_terms_are_declared_for_the_budget():
    assert terms_of(InstrumentedTool(double, cost=0.25, repeatable=True)).cost == 0.25
    assert terms_of(InstrumentedTool(double, cost=0.25, repeatable=True)).repeatable
    priced = double.model_copy(update={"metadata": {"cost": 2.0, "team": "x"}})
    assert InstrumentedTool(priced).metadata == {"cost": 2.0, "team": "x"}
    assert InstrumentedTool(priced, cost=0.0).metadata["cost"] == 0.0
    exact = InstrumentedTool(double, cost=Decimal("0.5"))
    assert (exact.invoke({"number": 1}), exact.usage.cost, terms_of(exact).cost) == ("2", 0.5, 0.5)


@pytest.mark.parametrize("key", ["cheap", None, -1, float("nan"), True, 10**400])
def test_a_key_of_somebody_elses_is_no_price(key):
    tool = InstrumentedTool(double.model_copy(update={"metadata": {"cost": key}}))
    assert (tool.invoke({"number": 1}), tool.usage.cost, tool.usage.ok) == ("2", 0.0, 1)


def test_a_meter_may_be_shared():
    meter = UsageMeter()
    InstrumentedTool(double, meter=meter, cost=2.0).invoke({"number": 1})
    InstrumentedTool(double, meter=meter, cost=3.0).invoke({"number": 1})
    assert (meter.read().calls, meter.read().cost) == (2, 5.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"cost": -1}, "cost"),
        ({"retries": 1}, "idempotent=True"),
    ],
)
def test_settings_are_checked(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        InstrumentedTool(double, **arguments)
    with pytest.raises(ConfigurationError, match="LangChain tool"):
        InstrumentedTool(print)


def test_a_tool_that_is_given_more_than_arguments_is_not_cached():
    @tool
    def sees_state(x: int, state: Annotated[dict, InjectedState]) -> str:
        """See."""
        return ""

    @tool
    def sees_runtime(x: int, runtime: ToolRuntime) -> str:
        """See."""
        return ""

    for seeing in (sees_state, sees_runtime):
        with pytest.raises(ConfigurationError, match="injects"):
            InstrumentedTool(seeing, cache=ResultCache())


def test_the_meter_adds_up():
    meter = UsageMeter()
    assert meter.read() == ToolUsage()
    for number in range(100):
        meter.add("ok", seconds=number / 100, cost=0.5)
    meter.add("timeout", seconds=9.0, retries=2)
    meter.add("cached", seconds=99.0, cost=99.0)
    usage = meter.read()
    assert (usage.calls, usage.ok, usage.timeouts, usage.cached, usage.retries) == (102, 100, 1, 1, 2)
    assert (usage.seconds, usage.cost) == (pytest.approx(58.5), 50.0)
    assert (usage.seconds_p50, usage.seconds_p95) == (0.5, 0.95)
    meter.reset()
    assert meter.read() == ToolUsage()
