from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.rules.answers import fallback_answer, with_all_results
from metis_agent.types import ToolOutcome
from tests.fakes import call, calling


def test_the_fallback_says_why_and_what_was_found():
    def outcome(number: int, status: str = "ok") -> ToolOutcome:
        return ToolOutcome(call_id="1", tool="a", arguments={}, status=status, content=f"result {number}")

    outcomes = [outcome(1), outcome(2), outcome(3, "blocked"), outcome(4), outcome(5)]
    text = fallback_answer(AIMessage("", id="m"), "the budget is spent", outcomes).content
    assert "the budget is spent" in text
    assert "result 1" not in text
    assert "result 3" not in text
    assert all(f"result {number}" in text for number in (2, 4, 5))
    long = ToolOutcome(call_id="1", tool="a", arguments={}, status="ok", content="x" * 9000)
    assert len(fallback_answer(AIMessage(""), "", [long]).content) < 2500


def test_a_whole_conversation_stays_the_same_object():
    messages = [HumanMessage("q"), calling(call("a", id="1")), ToolMessage("x", tool_call_id="1")]
    assert with_all_results(messages) is messages
    assert with_all_results(messages[:1]) == messages[:1]


def test_every_lost_call_gets_a_message_right_after_it():
    lost = calling(call("a", id="1"), call("b", id="2"))
    lost.invalid_tool_calls = [{"name": None, "args": "", "id": "3", "error": None}]
    messages = [HumanMessage("q"), lost, ToolMessage("x", tool_call_id="2"), HumanMessage("again")]
    completed = with_all_results(messages)
    assert [getattr(message, "tool_call_id", None) for message in completed] == [None, None, "2", "1", "3", None]
    assert completed[3].status == "error"
    assert len(messages) == 4


def test_a_lost_call_with_the_id_of_another_is_lost_all_the_same():
    def round_of(*results):
        return [HumanMessage("q"), calling(call("a", id="a:0")), *[ToolMessage(r, tool_call_id="a:0") for r in results]]

    completed = with_all_results([*round_of("one"), *round_of(), *round_of("three")])
    texts = [message.text for message in completed if isinstance(message, ToolMessage)]
    assert texts[0] == "one"
    assert "no result" in texts[1]
    assert texts[2] == "three"


def test_results_come_right_after_their_calls_and_never_alone():
    result, orphan = ToolMessage("x", tool_call_id="1"), ToolMessage("y", tool_call_id="9")
    messages = [HumanMessage("q"), calling(call("a", id="1")), HumanMessage("wait"), result, orphan]
    assert [message.type for message in with_all_results(messages)] == ["human", "ai", "tool", "human"]
