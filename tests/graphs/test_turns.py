"""How turns end: budgets, repetition, stubborn models, failing and hanging tools."""

import asyncio
import time
from fractions import Fraction
from types import MappingProxyType
from typing import ClassVar

import pytest
from langchain.agents.middleware import ToolRetryMiddleware
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, StructuredTool, ToolException, tool

from metis_agent.agent import create_metis_agent
from metis_agent.errors import InfrastructureError, InputError, SandboxGoneError
from metis_agent.gates import AlwaysGate, Gate, NeverGate
from metis_agent.rules.budget import Budget
from metis_agent.tools.proxy import ProxyTool
from metis_agent.types import GateDecision
from tests.fakes import call, calling, model


@pytest.fixture
def ran():
    return []


@pytest.fixture
def look(ran):
    @tool
    def look(query: str) -> str:
        """Look it up."""
        ran.append(query)
        return f"found {query}"

    return look


@pytest.fixture
def wait():
    @tool
    def wait(seconds: float) -> str:
        """Wait."""
        time.sleep(seconds)
        return "done"

    return wait


@pytest.fixture(params=["sync", "async"])
def ask(request):
    """Runs one turn, in either flavour."""

    async def ask(chat, tools, text="q", **options):
        agent = create_metis_agent(chat, tools, **options)
        state = {"messages": [HumanMessage(text)]}
        if request.param == "async":
            return await agent.ainvoke(state)
        return await asyncio.to_thread(agent.invoke, state)

    return ask


def statuses(state):
    return [outcome.status for outcome in state["outcomes"]]


async def test_hi_calls_no_tool(ask, look, ran):
    chat = model(lambda messages: calling(call("look", query="hi")) if chat.asked[-1].tools else "hello")
    state = await ask(chat, [look], "hi", gate=NeverGate())
    assert ran == []
    assert state["messages"][-1].content == "hello"
    assert [decision.direct for decision in state["decisions"]] == [True]


@pytest.mark.parametrize("options", [{}, {"tool_timeout": None}])
async def test_a_call_its_result_and_the_answer(ask, look, ran, options):
    state = await ask(model(calling(call("look", query="x")), "x it is"), [look], **options)
    assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert state["messages"][2].content == "found x"
    assert ran == ["x"]
    (outcome,) = state["outcomes"]
    assert (outcome.tool, outcome.arguments, outcome.status) == ("look", {"query": "x"}, "ok")
    assert outcome.content == "found x"
    assert outcome.seconds > 0
    assert len(state["decisions"]) == 2
    assert state["calls"] == []


async def test_a_spent_budget_is_one_last_turn_without_tools(ask, look, ran):
    numbers = iter(range(100))
    chat = model(lambda m: calling(call("look", query=str(next(numbers)))) if chat.asked[-1].tools else "enough")
    state = await ask(chat, [look], budget=Budget(calls=3))
    assert ran == ["0", "1", "2"]
    assert state["messages"][-1].content == "enough"
    last = state["decisions"][-1]
    assert (last.gate, last.reason, last.direct) == ("budget", "the budget of 3 tool calls is spent", True)


async def test_a_budget_of_no_calls_answers_at_once(ask, look):
    chat = model("ok")
    await ask(chat, [look], budget=Budget(calls=0))
    assert [asked.tools for asked in chat.asked] == [()]


async def test_a_stubborn_model_is_asked_once_more_and_then_answered_for(ask, look, ran):
    chat = model(calling(call("look", query="x")))
    state = await ask(chat, [look], gate=NeverGate())
    assert ran == []
    assert len(chat.asked) == 2
    assert chat.asked[1].messages[-1].type == "human"
    assert "plain text" in chat.asked[1].messages[-1].content
    final = state["messages"][-1]
    assert isinstance(final, AIMessage)
    assert final.tool_calls == []
    assert "gave no answer" in final.content
    assert statuses(state) == ["blocked", "blocked"]
    assert len(state["messages"]) == 2


async def test_a_stubborn_model_may_still_come_round(ask, look):
    state = await ask(model(calling(call("look", query="x")), "fine"), [look], gate=NeverGate())
    assert state["messages"][-1].content == "fine"


async def test_text_beside_stripped_calls_is_the_answer(ask, look):
    chat = model(calling(call("look", query="x"), text="It is 7."))
    state = await ask(chat, [look], gate=NeverGate())
    assert state["messages"][-1].content == "It is 7."
    assert state["messages"][-1].tool_calls == []
    assert len(chat.asked) == 1


async def test_the_fallback_tells_why_and_what_was_found(ask, look):
    chat = model(calling(call("look", query="x")), "")
    state = await ask(chat, [look], budget=Budget(calls=1))
    text = state["messages"][-1].content
    assert "the budget of 1 tool calls is spent" in text
    assert "found x" in text


async def test_an_empty_reply_of_the_acting_model_is_asked_for_again(ask, look):
    chat = model(AIMessage([]), AIMessage([{"type": "text", "text": "seven"}]))
    state = await ask(chat, [look])
    assert state["messages"][-1].text == "seven"
    assert chat.asked[1].tools == ()


async def test_a_model_that_wants_its_tools_named_is_bound_to_none(ask, look):
    class Steady(type(model())):
        offers_tools_when_direct: ClassVar[bool] = True

    chat = Steady(script=["ok"])
    await ask(chat, [look], gate=NeverGate())
    assert (chat.asked[0].tools, chat.asked[0].tool_choice) == (("look",), "none")


async def test_an_identical_call_returns_the_earlier_result(ask, look, ran):
    chat = model(
        calling(call("look", id="1", query="x")), calling(call("look", id="2", query="x")),
        calling(call("look", id="3", query="y")), "ok",
    )  # fmt: skip
    state = await ask(chat, [look])
    assert ran == ["x", "y"]
    assert statuses(state) == ["ok", "repeated", "ok"]
    repeated = state["messages"][4]
    assert repeated.tool_call_id == "2"
    assert "not run again" in repeated.content
    assert "found x" in repeated.content


async def test_a_model_that_only_repeats_has_to_answer(ask, look, ran):
    chat = model(lambda m: calling(call("look", query="x")) if chat.asked[-1].tools else "stop")
    state = await ask(chat, [look])
    assert ran == ["x"]
    assert statuses(state) == ["ok", "repeated", "repeated"]
    assert (state["decisions"][-1].gate, state["messages"][-1].content) == ("loop guard", "stop")


async def test_identical_calls_side_by_side_run_once(ask, look, ran):
    same = [call("look", id=str(number), query="x") for number in range(3)]
    state = await ask(model(calling(*same), "ok"), [look])
    assert ran == ["x"]
    assert sorted(statuses(state)) == ["ok", "repeated", "repeated"]
    results = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert sorted(message.tool_call_id for message in results) == ["0", "1", "2"]
    assert sum(message.content == "found x" for message in results) == 1
    assert sum("0, runs in place" in message.content for message in results) == 2


async def test_repeatable_tools_run_again(ask, look, ran):
    look.metadata = {"repeatable": True}
    twice = calling(call("look", id="1", query="x"), call("look", id="2", query="x"))
    chat = model(twice, calling(call("look", query="x")), "ok")
    state = await ask(chat, [look])
    assert ran == ["x", "x", "x"]
    assert statuses(state) == ["ok", "ok", "ok"]


async def test_a_tool_that_raises_is_read_by_the_model(ask):
    @tool
    def divide(a: int, b: int) -> float:
        """Divide."""
        if b == 13:
            raise ToolException("13 is unlucky")
        return a / b

    chat = model(
        calling(call("divide", id="1", a=1, b=0)), calling(call("divide", id="2", a=1, b=13)),
        calling(call("divide", id="3", a="one", b=2)), "ok",
    )  # fmt: skip
    state = await ask(chat, [divide])
    assert statuses(state) == ["error", "error", "error"]
    results = [message for message in state["messages"] if isinstance(message, ToolMessage)]
    assert [message.status for message in results] == ["error"] * 3
    assert "ZeroDivisionError" in results[0].content
    assert results[1].content == "13 is unlucky"
    assert "valid integer" in results[2].content


async def test_infrastructure_failures_are_not_the_models_to_read(ask):
    @tool
    def run(code: str) -> str:
        """Run."""
        raise SandboxGoneError("the sandbox died")

    with pytest.raises(InfrastructureError, match="sandbox died"):
        await ask(model(calling(call("run", code="1"))), [run])


async def test_a_tool_that_hangs_is_abandoned(ask, wait):
    started = time.perf_counter()
    state = await ask(model(calling(call("wait", seconds=1.5)), "never mind"), [wait], tool_timeout=0.1)
    assert time.perf_counter() - started < 1.4
    assert statuses(state) == ["timeout"]
    assert state["messages"][2].status == "error"
    assert "0.1 seconds" in state["messages"][2].content
    assert state["messages"][-1].content == "never mind"


async def test_an_async_tool_that_hangs_is_cancelled():
    cancelled = []

    @tool
    async def wait(seconds: float) -> str:
        """Wait."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return "done"

    agent = create_metis_agent(model(calling(call("wait", seconds=30.0)), "ok"), [wait], tool_timeout=0.05)
    state = await agent.ainvoke({"messages": [HumanMessage("q")]})
    assert statuses(state) == ["timeout"]
    assert cancelled == [True]


async def test_the_budgets_seconds_limit_tools_and_turn(ask, wait):
    chat = model(lambda m: calling(call("wait", seconds=1.5)) if chat.asked[-1].tools else "time is up")
    started = time.perf_counter()
    state = await ask(chat, [wait], budget=Budget(seconds=0.2))
    assert time.perf_counter() - started < 1.4
    assert statuses(state) == ["timeout"]
    assert state["decisions"][-1].reason == "the budget of 0.2 seconds is spent"
    assert state["messages"][-1].content == "time is up"


async def test_parallel_tools_count_once_in_seconds(ask, wait):
    spent = []

    class Watching(Gate):
        def decide(self, request):
            spent.append(request.spent)
            return GateDecision(allowed=("wait",))

    chat = model(
        calling(
            *(call("wait", id=name, seconds=seconds) for name, seconds in zip("abc", (0.15, 0.14, 0.13), strict=True))
        ),
        "ok",
    )
    await ask(chat, [wait], gate=Watching())
    assert spent[0].seconds == 0
    assert spent[1].calls == 3
    assert 0.15 <= spent[1].seconds < 0.44


@pytest.mark.parametrize("content", ["", "  \n ", [], [{"type": "text", "text": " "}]])
async def test_a_blank_question_is_refused_before_the_model_is_asked(ask, look, content):
    chat = model()
    with pytest.raises(InputError, match="blank"):
        await ask(chat, [look], content)
    assert chat.asked == []


@pytest.mark.parametrize("messages", [[], [AIMessage("hello")]])
def test_no_question_is_refused_before_the_model_is_asked(messages):
    chat = model()
    with pytest.raises(InputError, match="human message"):
        create_metis_agent(chat).invoke({"messages": messages})
    assert chat.asked == []


async def test_a_picture_is_a_question(ask):
    picture = [{"type": "image", "url": "https://example.org/x.png"}]
    assert (await ask(model("a cat"), [], picture))["messages"][-1].content == "a cat"


async def test_an_agent_without_tools_answers(ask):
    state = await ask(model("ok"), [])
    assert state["decisions"][0].reason == "the agent has no tools"
    assert state["messages"][-1].content == "ok"


async def test_a_gate_that_fails_leaves_it_to_the_model(ask, look, caplog):
    class Broken(Gate):
        def estimate(self, request):
            raise RuntimeError("no weights")

    state = await ask(model(calling(call("look", query="x")), "ok"), [look], gate=Broken(version="2"))
    decision = state["decisions"][0]
    assert decision.allowed == ("look",)
    assert (decision.gate, decision.version) == ("Broken", "2")
    assert "RuntimeError: no weights" in decision.reason
    assert "no weights" in caplog.text


@pytest.mark.parametrize("answer", [None, ("look",), True])
async def test_a_gate_that_returns_something_else_leaves_it_to_the_model(ask, look, answer):
    class Odd(Gate):
        def decide(self, request):
            return answer

    state = await ask(model("ok"), [look], gate=Odd())
    assert "no GateDecision" in state["decisions"][0].reason


@pytest.mark.parametrize(("wanted", "allowed"), [(("rob", "look"), ("look",)), (("rob",), ())])
async def test_a_gate_cannot_allow_what_is_not_offered(ask, look, wanted, allowed):
    class Generous(Gate):
        def decide(self, request):
            return GateDecision(allowed=wanted, required=True)

    decision = (await ask(model("ok"), [look], gate=Generous()))["decisions"][0]
    assert (decision.allowed, decision.required) == (allowed, bool(allowed))


async def test_a_decision_is_stored_in_plain_values(ask, look):
    class Fancy(Gate):
        def decide(self, request):
            return GateDecision(allowed=["look"], probabilities=MappingProxyType({"look": Fraction(3, 4)}))

    decision = (await ask(model("ok"), [look], gate=Fancy()))["decisions"][0]
    assert (decision.allowed, decision.probabilities) == (("look",), {"look": 0.75})
    assert type(decision.probabilities) is dict
    assert type(decision.probabilities["look"]) is float


async def test_always_gate_requires_the_first_call_only(ask, look):
    chat = model(calling(call("look", query="x")), "ok")
    await ask(chat, [look], gate=AlwaysGate())
    assert [asked.tool_choice for asked in chat.asked] == ["any", None]


async def test_the_time_a_gate_takes_is_noted(ask, look):
    class Slow(Gate):
        def decide(self, request):
            time.sleep(0.02)
            return GateDecision(allowed=())

    assert (await ask(model("ok"), [look], gate=Slow()))["decisions"][0].seconds >= 0.02


async def test_a_tool_that_returns_directly_has_the_last_word(ask, ran):
    @tool(return_direct=True)
    def quote(text: str) -> str:
        """Quote."""
        if text == "bad":
            raise ToolException("nothing to quote")
        return f"“{text}”"

    chat = model(calling(call("quote", text="x")), "never said")
    state = await ask(chat, [quote])
    assert state["messages"][-1].content == "“x”"
    assert len(chat.asked) == 1
    # A failure is no answer.
    assert (await ask(model(calling(call("quote", text="bad")), "sorry"), [quote]))["messages"][-1].content == "sorry"


async def test_a_tool_that_is_async_only_runs_in_sync_runs_too(ask):
    async def find(query: str) -> str:
        await asyncio.sleep(0)
        return f"found {query}"

    only_async = StructuredTool.from_function(coroutine=find, name="find", description="Find it.")
    state = await ask(model(calling(call("find", query="x")), "ok"), [only_async])
    assert [(o.status, o.content) for o in state["outcomes"]] == [("ok", "found x")]


@pytest.mark.parametrize("proxy", [None, ProxyTool])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_tool_class_that_is_async_only_runs_in_sync_runs_too(ask, wrapped, proxy):
    class Find(BaseTool):
        name: str = "find"
        description: str = "Find it."

        def _run(self, query: str) -> str:
            raise NotImplementedError("find is async only")

        async def _arun(self, query: str) -> str:
            await asyncio.sleep(0)
            if query == "y":
                raise NotImplementedError("no such search")
            return f"found {query}"

    chat = model(calling(call("find", id="1", query="x"), call("find", id="2", query="y")), "ok")
    middleware = [ToolRetryMiddleware(max_retries=0)] if wrapped else ()
    state = await ask(chat, [proxy(Find()) if proxy else Find()], middleware=middleware)
    assert (state["outcomes"][0].status, state["outcomes"][0].content) == ("ok", "found x")
    assert state["outcomes"][1].status == "error"
    assert "no such search" in state["outcomes"][1].content


@pytest.mark.parametrize("proxy", [None, ProxyTool])
@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_tool_class_with_sync_and_async_code_runs_once(ask, ran, wrapped, proxy):
    class Send(BaseTool):
        name: str = "send"
        description: str = "Send it."

        def _run(self, text: str) -> str:
            ran.append(text)
            return self._receipt(text)

        async def _arun(self, text: str) -> str:
            return self._run(text)

        def _receipt(self, text: str) -> str:
            raise NotImplementedError("no receipts yet")

    chat = model(calling(call("send", text="x")), "ok")
    middleware = [ToolRetryMiddleware(max_retries=0, on_failure="error")] if wrapped else ()
    state = await ask(chat, [proxy(Send()) if proxy else Send()], middleware=middleware)
    assert ran == ["x"]
    assert state["outcomes"][0].status == "error"
    assert "no receipts yet" in state["outcomes"][0].content
