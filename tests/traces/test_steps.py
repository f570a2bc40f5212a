"""A recorded run as the states that it visited."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, message_to_dict

from metis_agent.agent import create_metis_agent
from metis_agent.errors import InputError
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import steps_of
from metis_agent.types import ModelCall, Question, ToolOutcome, Trajectory
from tests.fakes import call, calling, model


def asking(*ids, text=""):
    return AIMessage(text, tool_calls=[{"name": "look", "args": {"n": id}, "id": id} for id in ids])


def result(id, text="found"):
    return ToolMessage(text, tool_call_id=id, name="look")


def run(*messages, history=(), **fields):
    def as_dicts(given):
        return tuple(message_to_dict(message) for message in given)

    return Trajectory(
        id="t", question=Question(id="q", text="q"), messages=as_dicts(messages), history=as_dicts(history), **fields
    )


def kinds(step):
    return [message.type for message in step.messages]


def test_a_run_of_two_rounds_visits_three_states():
    # s_0: system, human. s_1: + ai, tool, tool. s_2: + ai, tool; there it answers.
    outcomes = tuple(
        ToolOutcome(call_id=id, tool="look", arguments={}, status=status, seconds=seconds, cost=cost)
        for id, status, seconds, cost in (("a", "ok", 2, 0.5), ("b", "error", 3, 0.25), ("c", "blocked", 0, 9))
    )
    record = run(
        HumanMessage("q"), asking("a", "b"), result("a"), result("b"), asking("c"), result("c"), AIMessage("done"),
        history=[SystemMessage("be brief")], outcomes=outcomes,
    )  # fmt: skip
    first, second, third = steps_of(record)
    assert [step.index for step in (first, second, third)] == [0, 1, 2]
    assert kinds(first) == ["system", "human"]
    assert kinds(second) == ["system", "human", "ai", "tool", "tool"]
    assert kinds(third) == [*kinds(second), "ai", "tool"]
    # Two calls side by side take as long as the longer; a blocked one costs nothing.
    assert (first.round.executed, first.round.seconds, first.round.cost) == (2, 3, 0.75)
    assert (second.round.executed, second.round.cost) == (0, 0)
    assert third.round is None
    assert [step.answered for step in (first, second, third)] == [False, False, True]
    assert third.reply.text == "done"


def test_a_run_without_tools_is_one_step():
    (only,) = steps_of(run(HumanMessage("q"), AIMessage("a")))
    assert (only.index, only.round, only.answered, kinds(only)) == (0, None, True, ["human"])


@pytest.mark.parametrize(
    ("messages", "steps", "reply"),
    [
        ([HumanMessage("q")], 1, None),
        ([HumanMessage("q"), asking("a")], 1, "asks"),
        ([HumanMessage("q"), asking("a"), result("a")], 2, None),
        ([], 1, None),
    ],
)
def test_a_run_that_broke_off_has_no_answer(messages, steps, reply):
    *before, last = steps_of(run(*messages))
    assert len(before) == steps - 1
    assert all(step.round is not None for step in before)
    assert last.round is None
    assert not last.answered
    assert (last.reply is None) == (reply is None)


def test_what_is_said_between_rounds_is_read_but_is_no_round():
    record = run(HumanMessage("q"), asking("a"), result("a"), AIMessage("Let me think."), asking("b"), result("b"))
    first, second, third = steps_of(record)
    assert kinds(second)[-1] == "ai"
    assert second.round.executed == 1
    assert third.reply is None
    assert kinds(first) == ["human"]


def test_a_missing_result_is_said_and_one_that_nothing_asked_for_is_left_out():
    record = run(
        HumanMessage("q"), asking("a", "b"), result("b"), result("x"), AIMessage("done"),
        history=[result("gone"), HumanMessage("p"), asking("h"), HumanMessage("p2")],
    )  # fmt: skip
    first, second = steps_of(record)
    assert kinds(first) == ["human", "ai", "tool", "human", "human"]
    assert kinds(second)[-3:] == ["ai", "tool", "tool"]
    # As a prompt is completed in service: results in the order in which they came, then what is missing.
    assert [message.tool_call_id for message in second.messages[-2:]] == ["b", "a"]
    assert "no result" in second.messages[-1].text
    assert [outcome.status for outcome in first.round.outcomes] == ["error", "ok"]


def test_calls_that_are_numbered_anew_in_every_message_keep_their_own_results():
    outcomes = tuple(
        ToolOutcome(call_id="1", tool="look", arguments={}, status=status, content=text)
        for status, text in (("ok", "one"), ("error", "two"))
    )
    record = run(
        HumanMessage("q"), asking("1"), result("1", "one"), asking("1"), result("1", "two"), AIMessage("done"),
        history=[HumanMessage("p"), asking("1"), result("1", "old"), AIMessage("so")], outcomes=outcomes,
    )  # fmt: skip
    first, second, third = steps_of(record)
    assert [message.text for message in third.messages if message.type == "tool"] == ["old", "one", "two"]
    assert [step.round.outcomes[0].content for step in (first, second)] == ["one", "two"]
    assert [step.round.outcomes[0].status for step in (first, second)] == ["ok", "error"]


def test_each_reply_has_its_model_call_and_drafts_are_passed_over():
    calls = (
        ModelCall(node="draft", step=0, text="a guess"),
        ModelCall(node="act", step=1, tool_calls=({"name": "look", "args": {}, "id": "a"},), usage={"input_tokens": 7}),
        ModelCall(node="answer", step=2, text="done", seconds=1.5),
    )
    first, second = steps_of(run(HumanMessage("q"), asking("a"), result("a"), AIMessage("done"), calls=calls))
    assert first.model_call == calls[1]
    assert second.model_call == calls[2]


def test_what_the_agent_itself_records_has_steps(tmp_path):
    store = TrajectoryStore(tmp_path)
    agent = create_metis_agent(model(calling(call("look", query="x")), "done"), [look], recorder=Recorder(store))
    agent.invoke({"messages": [("user", "q")]})
    (record,) = store.read()
    first, second = steps_of(record)
    assert first.round.outcomes == record.outcomes
    assert first.model_call.tool_calls
    assert second.model_call.text == "done"
    assert second.answered


def look(query: str) -> str:
    """Look it up."""
    return f"found {query}"


def test_a_message_that_is_none_is_named():
    record = Trajectory(id="t", question=Question(id="q", text="q"), messages=({"type": "nonsense", "data": {}},))
    with pytest.raises(InputError, match=r"'t'.*nonsense"):
        steps_of(record)
