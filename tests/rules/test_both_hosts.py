"""Every rule of a turn holds in both hosts, sync and async: in our own graph, and behind `create_agent`."""

import threading
import time
from typing import Annotated

import pytest
from langchain_core.messages import AIMessage, HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.types import Command, Overwrite

from metis_agent.gates import AlwaysGate, Gate, NeverGate
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.types import GateDecision
from tests.fakes import call, calling, model
from tests.middleware.helpers import Only, answered, results, statuses

THREAD = {"configurable": {"thread_id": "t"}}


@pytest.fixture
def files():
    """A file to read and write."""
    content = {"a": "old"}

    @tool
    def read(path: str) -> str:
        """Read a file."""
        return content[path]

    @tool
    def write(path: str, text: str) -> str:
        """Write a file."""
        content[path] = text
        return "written"

    return [read, write]


# Enforcement.


def test_an_allowed_call_runs(make, go, ran, tools):
    state = go(make(model(calling(call("look", query="x")), "ok"), tools, Only("look", "pay")))
    assert ran == [("look", "x")]
    assert [(o.tool, o.status, o.content) for o in state["outcomes"]] == [("look", "ok", "found x")]
    assert [d.allowed for d in state["decisions"]] == [("look", "pay")] * 2


def test_a_list_of_texts_is_a_result_that_providers_take(make, go):
    @tool
    def names(of: str) -> list[str]:
        """Name them."""
        return [f"{of} 1", f"{of} 2"]

    state = go(make(model(calling(call("names", of="x")), "ok"), [names]))
    assert [m.content for m in state["messages"] if m.type == "tool"] == ['["x 1", "x 2"]']
    assert [o.content for o in state["outcomes"]] == ['["x 1", "x 2"]']


def test_a_tool_that_the_gate_withheld_never_runs(make, go, ran, tools):
    state = go(make(model(calling(call("pay", amount=5)), "sorry"), tools, Only("look")))
    assert ran == []
    assert "gate did not allow" in answered(state)["call_1"]
    assert (state["decisions"][-1].gate, state["messages"][-1].text) == ("loop guard", "sorry")


def test_a_direct_decision_takes_calls_out(make, go, ran, tools):
    state = go(make(model(calling(call("pay", amount=5), text="It is 4.")), tools, NeverGate()))
    assert [message.text for message in state["messages"]] == ["q", "It is 4."]
    assert (ran, statuses(state)) == ([], ["blocked"])


def test_required_holds_for_the_first_call_only(make, go, tools):
    chat = model(calling(call("look", query="x")), "ok")
    go(make(chat, tools, AlwaysGate()))
    assert [asked.tool_choice for asked in chat.asked] == ["any", None]


# Answers.


def test_a_model_that_says_nothing_is_asked_again_and_then_answered_for(make, go, tools):
    chat = model(calling(call("look", query="x")), "", "")
    state = go(make(chat, tools))
    assert "found x" in state["messages"][-1].text
    assert "not answered yet" in chat.asked[-1].messages[-1].text


def test_an_empty_draft_is_no_answer(make, go, tools):
    class Drafting(NeverGate):
        wants_draft = True

    chat = model("  ", "asked properly")
    state = go(make(chat, tools, Drafting()))
    assert state["messages"][-1].text == "asked properly"
    assert [message.type for message in chat.asked[1].messages] == ["human"]


# Loops.


def test_a_call_runs_again_once_something_else_has_run(make, go, files):
    chat = model(
        calling(call("read", id="1", path="a")), calling(call("write", id="2", path="a", text="new")),
        calling(call("read", id="3", path="a")), "done",
    )  # fmt: skip
    state = go(make(chat, files))
    assert results(state) == ["old", "written", "new"]
    assert statuses(state) == ["ok"] * 3


def test_a_call_runs_again_after_another_of_the_same_message(make, go, files):
    read = {"path": "a"}
    both = calling(
        call("read", id="1", **read), call("write", id="2", path="a", text="new"), call("read", id="3", **read),
        call("read", id="4", **read),
    )  # fmt: skip
    state = go(make(model(both, "done"), files))
    assert {outcome.call_id: outcome.status for outcome in state["outcomes"]} == {
        "1": "ok", "2": "ok", "3": "ok", "4": "repeated",
    }  # fmt: skip
    assert "call in the same message, 3," in answered(state)["4"]


def test_a_call_runs_again_beside_another(make, go, files):
    both = calling(call("write", id="2", path="a", text="new"), call("read", id="3", path="a"))
    state = go(make(model(calling(call("read", id="1", path="a")), both, "done"), files))
    assert statuses(state) == ["ok"] * 3


def test_an_identical_call_with_nothing_run_since_gets_the_earlier_result(make, go, ran, tools):
    again = calling(call("look", id="2", query="x"))
    state = go(make(model(calling(call("look", id="1", query="x")), again, "ok"), tools))
    assert ran == [("look", "x")]
    assert answered(state)["2"].endswith("found x")
    assert "not run again" in answered(state)["2"]


def test_never_the_result_of_another_turn_whatever_the_ids(make, go, ran, tools):
    def look(query):
        return calling(call("look", id="look:0", query=query))

    chat = model(look("Paris"), "sunny", look("Rome"), look("Rome"), "done")
    agent = make(chat, tools, checkpointer=InMemorySaver())
    go(agent, "Paris?", THREAD)
    state = go(agent, "Rome?", THREAD)
    assert results(state)[-1].endswith("found Rome")
    assert ran == [("look", "Paris"), ("look", "Rome")]


def test_a_round_trip_that_brings_nothing_new_ends(make, go, files):
    def again(messages):
        if not chat.asked[-1].tools:
            return "enough"
        number = len(chat.asked)
        return calling(call("read", id=str(number), path="a") if number % 2 else
                       call("write", id=str(number), path="a", text="same"))  # fmt: skip

    chat = model(again)
    state = go(make(chat, files, budget=Budget(calls=50)), config={"recursion_limit": 200})
    assert state["messages"][-1].text == "enough"
    assert "same results" in state["decisions"][-1].reason
    assert statuses(state).count("ok") == 6


def test_polling_is_no_loop_where_the_tool_says_so(make, go, ran, tools):
    tools[0].metadata = {"repeatable": True}
    script = [calling(call("look", id=str(n), query="x")) for n in range(6)]
    state = go(make(model(*script, "ok"), tools))
    assert (len(ran), state["messages"][-1].text) == (6, "ok")


def test_identical_calls_in_one_message_run_once(make, go, ran, tools):
    state = go(make(model(calling(call("look", id="1", query="x"), call("look", id="2", query="x")), "ok"), tools))
    assert ran == [("look", "x")]
    assert answered(state)["1"] == "found x"
    assert "1, runs in place" in answered(state)["2"]


SLIPS = {
    "a mistyped name": calling(call("lok", id="1", query="x")),
    "no name": calling(call("", id="1", query="x")),
    "no id": calling({"name": "look", "args": {"query": "x"}, "id": "", "type": "tool_call"}),
    "no JSON": AIMessage("", invalid_tool_calls=[{"name": "look", "args": "{", "id": "1", "error": "cut short"}]),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_one_slip_may_be_corrected(make, go, ran, tools, slip):
    chat = model(SLIPS[slip], calling(call("look", id="2", query="x")), "ok")
    state = go(make(chat, tools))
    assert ran == [("look", "x")]
    assert state["messages"][-1].text == "ok"
    assert [asked.tools for asked in chat.asked] == [("look", "pay")] * 3


@pytest.mark.parametrize("times", [1, 2])
def test_a_call_that_its_provider_could_not_read_may_be_made_again(make, go, ran, tools, times):
    lost = AIMessage("", response_metadata={"finish_reason": "MALFORMED_FUNCTION_CALL"})
    chat = model(*[lost] * times, calling(call("look", query="x")) if times == 1 else "ok", "ok")
    state = go(make(chat, tools, Only("look")))
    assert state["messages"][-1].text == "ok"
    assert ran == [("look", "x")] * (2 - times)
    # What the model was told does not stay.
    assert sum(message.type == "human" for message in state["messages"]) == 1
    assert [asked.tools for asked in chat.asked[:3]] == [("look",), ("look",), ("look",) if times == 1 else ()]


def test_a_model_that_slips_twice_in_a_row_has_to_answer(make, go, ran, tools):
    chat = model(*(calling(call("lok", id=str(n))) for n in range(2)), "ok")
    state = go(make(chat, tools))
    assert [asked.tools for asked in chat.asked] == [("look", "pay"), ("look", "pay"), ()]
    assert "could be run" in state["decisions"][-1].reason


# Budgets and time.


def test_a_spent_budget_is_one_last_answer(make, go, ran, tools):
    numbers = iter(range(99))
    chat = model(lambda m: calling(call("look", query=str(next(numbers)))) if chat.asked[-1].tools else "enough")
    state = go(make(chat, tools, budget=Budget(calls=3)))
    assert len(ran) == 3
    assert state["decisions"][-1].reason == "the budget of 3 tool calls is spent"
    assert state["messages"][-1].text == "enough"


def test_a_budget_of_seconds_cuts_a_tool_that_runs(make, go):
    @tool
    def wait(seconds: float) -> str:
        """Wait."""
        time.sleep(seconds)
        return "done"

    chat = model(lambda m: calling(call("wait", seconds=3.0)) if chat.asked[-1].tools else "time is up")
    started = time.perf_counter()
    state = go(make(chat, [wait], budget=Budget(seconds=0.2)))
    assert time.perf_counter() - started < 2.5
    assert statuses(state) == ["timeout"]
    assert state["messages"][-1].text == "time is up"


def test_a_tools_human_message_begins_no_turn(make, go, ran, tmp_path):
    @tool
    def look(page: int, tool_call_id: Annotated[str, InjectedToolCallId]):
        """Show a page."""
        ran.append(page)
        message = ToolMessage("see below", tool_call_id=tool_call_id)
        return Command(update={"messages": [message, HumanMessage("[the page]")]})

    pages = iter(range(99))
    chat = model(lambda m: calling(call("look", page=next(pages))) if chat.asked[-1].tools else "done")
    asked = []

    class Watching(Gate):
        def decide(self, request):
            asked.append([message.text for message in request.messages if message.type == "human"][-1])
            return GateDecision(allowed=("look",))

    with TrajectoryStore(tmp_path) as store:
        state = go(make(chat, [look], Watching(), budget=Budget(calls=3), recorder=Recorder(store)))
        [trajectory] = store.read()
    assert (len(ran), len(state["outcomes"]), state["messages"][-1].text) == (3, 3, "done")
    assert asked == ["q"] * 3
    assert (trajectory.question.text, trajectory.tool_calls) == ("q", 3)


SHOWN = HumanMessage("[the page]")
MORE = {
    "before its result": lambda said: [SHOWN, said],
    "two": lambda said: [said, SHOWN, HumanMessage("[another]")],
    "an image": lambda said: [
        said,
        HumanMessage([{"type": "image", "base64": "iVBORw0KGgo=", "mime_type": "image/png"}]),
    ],
    "a pair": lambda said: [said, ("user", "[the page]")],
    "a dict": lambda said: [said, {"role": "user", "content": "[the page]"}],
    "in the question's place": lambda said: [said, HumanMessage("[the page]", id="question")],
    "a whole turn": lambda said: [said, AIMessage("done"), SHOWN],
    "a system message": lambda said: [said, SystemMessage("A new session."), SHOWN],
    "nothing but itself": lambda said: [RemoveMessage(REMOVE_ALL_MESSAGES), SHOWN, said],
}
STATE = {
    "no outcomes": {"outcomes": [], "decisions": []},
    "outcomes put away": {"outcomes": Overwrite([])},
    "no turn": {"metis_turn": None},
    "no run": {"metis_run": False, "metis_turn": None},
}


@pytest.mark.parametrize("variant", [*MORE, *STATE, "a list of commands"])
def test_nothing_that_a_tool_returns_gives_its_budget_back(make, go, ran, variant):
    @tool
    def look(page: int, tool_call_id: Annotated[str, InjectedToolCallId]):
        """Show a page."""
        ran.append(page)
        said = ToolMessage("see below", tool_call_id=tool_call_id)
        if variant == "a list of commands":
            return [Command(update={"messages": [message]}) for message in (said, SHOWN)]
        messages = MORE.get(variant, lambda said: [said, SHOWN])(said)
        return Command(update={"messages": messages, **STATE.get(variant, {})})

    pages = iter(range(99))
    chat = model(lambda m: calling(call("look", page=next(pages))) if chat.asked[-1].tools else "done")
    question = {"messages": [HumanMessage("q", id="question")]}
    state = go(make(chat, [look], budget=Budget(calls=3)), question, {"recursion_limit": 100})
    assert (len(ran), state["messages"][-1].text) == (3, "done")


def test_a_turn_of_a_thread_begins_anew(make, go, ran, tools):
    look = calling(call("look", id="1", query="x"))
    agent = make(model(look, "one", look, "two"), tools, budget=Budget(calls=1), checkpointer=InMemorySaver())
    go(agent, config=THREAD)
    state = go(agent, "again", THREAD)
    assert (len(ran), statuses(state), len(state["decisions"])) == (2, ["ok"], 2)


def test_a_hung_tool_is_not_called_for_ever(make, go, monkeypatch):
    monkeypatch.setattr("metis_agent.deadline._MOST_LEFT", 2)
    release, called = threading.Event(), []

    @tool
    def hang(query: str) -> str:
        """Hang."""
        called.append(query)
        release.wait(60)
        return "late"

    replies = [calling(call("hang", query="x")), "ok"] * 20
    hang.metadata = {"cost": 5.0}
    agent = make(model(*replies), [hang], budget=Budget(seconds=0.5))
    try:
        outcomes = [go(agent)["outcomes"][0] for _ in range(4)]
    finally:
        release.set()
    assert len(called) == 2
    said = {outcome.content: (outcome.status, outcome.cost) for outcome in outcomes}
    refused = "hang: 2 earlier calls took too long and go on, so it was not called."
    assert said[refused] == ("blocked", 0.0)
