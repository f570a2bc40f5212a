"""`create_agent`'s middleware and answer formats in our own graph: what a plain agent does with them, ours does."""

import asyncio

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    AgentMiddleware,
    HumanInTheLoopMiddleware,
    ModelCallLimitMiddleware,
    PIIMiddleware,
    SummarizationMiddleware,
    TodoListMiddleware,
    ToolCallLimitMiddleware,
    ToolRetryMiddleware,
    after_agent,
    after_model,
    before_agent,
    before_model,
    dynamic_prompt,
    wrap_model_call,
    wrap_tool_call,
)
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from metis_agent import Budget, MetisGateMiddleware, Recorder, TrajectoryStore, create_metis_agent
from metis_agent.errors import ConfigurationError
from metis_agent.gates import ModelGate, NeverGate
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, Verdict

THREAD = {"configurable": {"thread_id": "t"}}
ASK = {"messages": [HumanMessage("q", id="q")]}


@tool
def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


@tool
def fails(query: str) -> str:
    """Fail the first time."""
    FAILED.append(query)
    if len(FAILED) < 2:
        raise ValueError("down")
    return "up"


FAILED = []


@pytest.fixture(params=["sync", "async"])
def go(request):
    def go(agent, given=ASK, config=None):
        return agent.invoke(given, config) if request.param == "sync" else asyncio.run(agent.ainvoke(given, config))

    return go


def said(state):
    return [(message.type, str(message.text)) for message in state["messages"]]


def both(go, script, tools, middleware=lambda: [], given=ASK, **options):
    """The same agent of both makers; what they say must agree."""
    states = []
    for make in (create_agent, create_metis_agent):
        FAILED.clear()
        states.append(go(make(model(*script), tools, middleware=middleware(), **options), given))
    assert said(states[0]) == said(states[1])
    return states


# Hooks.


def hook_log():
    log = []

    def noting(hook):
        def note(state, runtime):
            log.append(hook.__name__)

        note.__name__ = f"note_{hook.__name__}"
        return hook(note)

    @wrap_model_call
    def around(request, handler):
        log.append("model")
        return handler(request)

    @wrap_tool_call
    def around_tool(request, handler):
        log.append(request.tool_call["name"])
        return handler(request)

    notes = [noting(hook) for hook in (before_agent, before_model, after_model, after_agent)]
    return log, [*notes, around, around_tool]


def test_hooks_run_when_they_should(tmp_path):
    logs = []
    for make in (create_agent, create_metis_agent):
        log, hooks = hook_log()
        options = {"recorder": Recorder(TrajectoryStore(tmp_path))} if make is create_metis_agent else {}
        make(model(calling(call("look", query="x")), "ok"), [look], middleware=hooks, **options).invoke(ASK)
        logs.append(log)
    assert logs[0] == logs[1]
    [run] = TrajectoryStore(tmp_path).read()
    assert (run.tool_calls, run.answer) == (1, "ok")


def test_what_hooks_change_is_changed(go):
    @before_model
    def note(state, runtime):
        return {"messages": [HumanMessage("by the way")]} if len(state["messages"]) == 1 else None

    @after_model
    def shout(state, runtime):
        last = state["messages"][-1]
        return None if last.tool_calls else {"messages": [last.model_copy(update={"content": last.content.upper()})]}

    @dynamic_prompt
    def prompt(request):
        return f"{len(request.messages)} so far"

    _state, ours = both(go, [calling(call("look", query="x")), "done"], [look], lambda: [note, shout, prompt])
    assert said(ours)[-1] == ("ai", "DONE")


@pytest.mark.parametrize("kind", [before_model, after_model])
def test_a_jump_to_the_end(go, kind):
    @kind(can_jump_to=["end"])
    def stop(state, runtime):
        return {"jump_to": "end", "messages": [AIMessage("no more")]}

    both(go, [calling(call("look", query="x")), "done"], [look], lambda: [stop])


def test_known_middleware(go):
    both(go, [calling(call("look", query="al@example.com")), "mail bo@example.com"], [look],
         lambda: [PIIMiddleware("email", apply_to_output=True, apply_to_tool_results=True)])  # fmt: skip
    both(go, [calling(call("fails", query="x")), "done"], [fails], lambda: [ToolRetryMiddleware(initial_delay=0)])
    both(go, [calling(call("look", query="x")), calling(call("look", query="y")), "done"], [look],
         lambda: [ModelCallLimitMiddleware(run_limit=2, exit_behavior="end")])  # fmt: skip
    todos = [{"content": "look", "status": "pending"}]
    plain, ours = both(go, [calling(call("write_todos", todos=todos)), "done"], [look], lambda: [TodoListMiddleware()])
    assert plain["todos"] == ours["todos"] == todos


def test_a_summary(go):
    long = {"messages": [HumanMessage(f"{k} " * 40) for k in range(6)]}

    def summing():
        return [SummarizationMiddleware(model("a summary"), trigger=("messages", 4), keep=("messages", 2))]

    _plain, ours = both(go, [calling(call("look", query="x")), "done"], [look], summing, long)
    assert "a summary" in said(ours)[0][1]


@pytest.mark.parametrize(
    "decision",
    [
        {"type": "approve"},
        {"type": "reject", "message": "no"},
        {"type": "edit", "edited_action": {"name": "look", "args": {"query": "y"}}},
    ],
)
def test_a_person_approves(go, decision):
    states = []
    for make in (create_agent, create_metis_agent):
        chat = model(calling(call("look", query="x")), "done")
        hooks = [HumanInTheLoopMiddleware({"look": True})]
        agent = make(chat, [look], middleware=hooks, checkpointer=InMemorySaver())
        assert go(agent, ASK, THREAD)["__interrupt__"]
        states.append(go(agent, Command(resume={"decisions": [decision]}), THREAD))
    assert said(states[0]) == said(states[1])


def test_the_gate_holds_whatever_hooks_do(go):
    offered = []

    class Seen(AgentMiddleware):
        def wrap_model_call(self, request, handler):
            offered.append([one.name for one in request.tools])
            return handler(request)

        async def awrap_model_call(self, request, handler):
            offered.append([one.name for one in request.tools])
            return await handler(request)

    ran = []

    @tool
    def pay(amount: int) -> str:
        """Pay."""
        ran.append(amount)
        return "paid"

    chat = model(calling(call("pay", amount=5)), "ok")
    state = go(create_metis_agent(chat, [look, pay], gate=Only("look"), middleware=[Seen()]))
    assert (ran, offered[0]) == ([], ["look"])
    assert [outcome.status for outcome in state["outcomes"]] == ["blocked"]
    chat = model(calling(call("pay", amount=1)), calling(call("pay", amount=2)), "ok")
    go(create_metis_agent(chat, [look, pay], budget=Budget(calls=1), middleware=[Seen()]))
    assert ran == [1]


@pytest.mark.parametrize("end", ["continue", "end"])
def test_a_call_that_the_gate_has_answered_is_not_answered_again(go, end):
    blocked, second = call("fails", id="c1", query="x"), call("look", id="c2", query="y")
    chat = model(calling(call("look", id="c0", query="x")), calling(blocked, second), "ok")
    limit = ToolCallLimitMiddleware(run_limit=1, exit_behavior=end)
    state = go(create_metis_agent(chat, [look, fails], gate=Only("look"), middleware=[limit]))
    results = [message.tool_call_id for message in state["messages"] if isinstance(message, ToolMessage)]
    assert sorted(results) == ["c0", "c1", "c2"]


def test_a_second_gate_is_refused():
    with pytest.raises(ConfigurationError, match="has a gate already"):
        create_metis_agent(model(), [look], middleware=[MetisGateMiddleware(ModelGate())])


def test_no_recursion_limit_before_the_budget(go):
    script = [calling(call("look", id=str(k), query=str(k))) for k in range(8)]
    _, hooks = hook_log()
    nodes = [one for one in hooks if not (_of(one, "wrap_model_call") or _of(one, "wrap_tool_call"))]
    agent = create_metis_agent(model(*script, "done"), [look], middleware=nodes)
    assert said(go(agent))[-1] == ("ai", "done")
    assert said(asyncio.run(agent.abatch([ASK]))[0])[-1] == ("ai", "done")


def _of(middleware, hook):
    return getattr(type(middleware), hook) is not getattr(AgentMiddleware, hook)


# Answers in a format.


def test_an_answer_by_a_call(go):
    script = [calling(call("look", query="x")), calling(call("Verdict", id="2", text="hi"))]
    plain, ours = both(go, script, [look], response_format=ToolStrategy(Verdict))
    assert plain["structured_response"] == ours["structured_response"] == Verdict(text="hi")
    assert [outcome.tool for outcome in ours["outcomes"]] == ["look"]


def test_an_answer_by_a_call_where_the_gate_answers(go):
    chat = model(calling(call("Verdict", text="hi")))
    state = go(create_metis_agent(chat, [look], gate=NeverGate(), response_format=Verdict))
    assert state["structured_response"] == Verdict(text="hi")
    assert chat.asked[0].tools == ("Verdict",)


def test_an_answer_that_does_not_have_the_format_is_mended(go):
    script = [calling(call("Verdict", wrong="hi")), calling(call("Verdict", id="2", text="hi"))]
    _plain, ours = both(go, script, [look], response_format=ToolStrategy(Verdict))
    assert ours["structured_response"] == Verdict(text="hi")


def test_an_answer_in_the_providers_own_format(go):
    script = [calling(call("look", query="x")), '{"text": "hi"}']
    plain, ours = both(go, script, [look], response_format=ProviderStrategy(Verdict))
    assert plain["structured_response"] == ours["structured_response"] == Verdict(text="hi")


def test_each_turn_has_an_answer_of_its_own(go):
    chat = model(calling(call("Verdict", text="one")), "in words", "in words")
    agent = create_metis_agent(chat, [look], response_format=ToolStrategy(Verdict), checkpointer=InMemorySaver())
    assert go(agent, ASK, THREAD)["structured_response"] == Verdict(text="one")
    assert go(agent, {"messages": [HumanMessage("again")]}, THREAD).get("structured_response") is None


def test_an_answer_beside_a_call(go):
    beside = calling(call("look", query="x"), call("Verdict", id="2", text="early"))
    _plain, state = both(go, [beside, "never asked"], [look], response_format=ToolStrategy(Verdict))
    assert state["structured_response"] == Verdict(text="early")
    assert [outcome.content for outcome in state["outcomes"]] == ["found x"]
    asked = {one["id"] for message in state["messages"] if isinstance(message, AIMessage) for one in message.tool_calls}
    assert asked == {message.tool_call_id for message in state["messages"] if isinstance(message, ToolMessage)}


def test_what_is_redacted_in_messages_is_redacted_in_all_records():
    @tool
    def lookup(name: str) -> str:
        """Look up a person."""
        return "mail: alice@example.com"

    redacting = PIIMiddleware("email", strategy="redact", apply_to_tool_results=True, apply_to_output=True)
    chat = model(
        calling(call("lookup", id="1", name="a")), calling(call("lookup", id="2", name="a")), "bob@example.com"
    )
    saver = InMemorySaver()
    agent = create_metis_agent(chat, [lookup], middleware=[redacting], record_calls=True, checkpointer=saver)
    agent.invoke(ASK, THREAD)
    state = agent.get_state(THREAD).values
    assert [outcome.status for outcome in state["outcomes"]] == ["ok", "repeated"]
    assert "[REDACTED_EMAIL]" in state["messages"][-1].text
    assert "@example" not in str(state)


class Unlucky(AgentMiddleware):
    """Fails around a tool, before or after it has run."""

    def __init__(self, late):
        self.late = late

    def wrap_tool_call(self, request, handler):
        if self.late:
            handler(request)
        raise PermissionError("not for you")

    async def awrap_tool_call(self, request, handler):
        if self.late:
            await handler(request)
        raise PermissionError("not for you")


@pytest.mark.parametrize("case", ["before", "after", "after it was tried again"])
def test_an_error_of_a_hook_ends_the_run_as_in_a_plain_agent(go, case, tmp_path):
    tries = []

    @tool
    def search(query: str) -> str:
        """Search."""
        tries.append(query)
        if case == "after it was tried again" and len(tries) == 1:
            raise ValueError("down")
        return f"found {query}"

    def hooks():
        tries.clear()
        return [Unlucky(late=case != "before"), ToolRetryMiddleware(max_retries=1, initial_delay=0, jitter=False)]

    chat = model(calling(call("search", query="x")), "done")
    with pytest.raises(PermissionError):
        go(create_agent(chat, [search], middleware=hooks()), ASK)
    with TrajectoryStore(tmp_path) as store:
        agent = create_metis_agent(model(*chat.script), [search], middleware=hooks(), recorder=Recorder(store))
        with pytest.raises(PermissionError):
            go(agent, ASK)
        [trajectory] = store.read()
    assert len(tries) == {"before": 0, "after": 1}.get(case, 2)
    assert (trajectory.status, trajectory.error) == ("failed", "PermissionError: not for you")


def test_an_error_of_a_tool_that_a_hook_passes_on_is_the_models_to_read(go):
    FAILED.clear()
    retry = ToolRetryMiddleware(max_retries=0, on_failure="error")
    state = go(create_metis_agent(model(calling(call("fails", query="x")), "done"), [fails], middleware=[retry]), ASK)
    assert state["messages"][-2].text == "fails failed with ValueError: down"
