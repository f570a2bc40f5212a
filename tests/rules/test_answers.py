import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.rules.answers import fallback_answer, sendable, with_all_results
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


@pytest.mark.parametrize(
    ("ids", "results", "sent", "answered"),
    [
        ((None,), (), ["call_1_0"], ["call_1_0"]),
        (("", ""), ("", ""), ["call_1_0", "call_1_1"], ["call_1_0", "call_1_1"]),
        (("a", "a"), ("a", "a", "a"), ["a", "call_1_1"], ["a", "call_1_1"]),
        (("a", None), ("a",), ["a", "call_1_1"], ["a", "call_1_1"]),
    ],
)
def test_every_call_of_a_thread_gets_an_id_of_its_own(ids, results, sent, answered):
    asked = AIMessage("", tool_calls=[{"name": "a", "args": {}, "id": id_} for id_ in ids])
    found = [ToolMessage(str(place), tool_call_id=id_) for place, id_ in enumerate(results)]
    prompt = sendable([HumanMessage("q"), asked, *found])
    assert [call["id"] for call in prompt[1].tool_calls] == sent
    assert [message.tool_call_id for message in prompt[2:]] == answered
    assert [message.text for message in prompt[2 : 2 + len(results)]] == ["0", "1"][: len(results)]
    assert sendable(prompt) is prompt
    again = [HumanMessage("q"), calling(call("a", id="a")), ToolMessage("1", tool_call_id="a")]
    assert [message.tool_call_id for message in sendable([*again, *again]) if message.type == "tool"] == [
        "a",
        "call_4_0",
    ]


def test_a_result_without_its_call_and_a_block_without_one_are_not_sent():
    assert sendable([ToolMessage("x", tool_call_id="9"), HumanMessage("q")]) == [HumanMessage("q")]
    block = {"type": "tool_use", "id": "1", "name": "a", "input": {}}
    for stray in (block, {**block, "id": ["1"]}):
        [asked, _] = sendable([AIMessage([{"type": "text", "text": "hm"}, stray]), HumanMessage("q")])
        assert asked.content == [{"type": "text", "text": "hm"}]
    other = AIMessage([block], tool_calls=[call("a", id="2")])
    assert sendable([HumanMessage("q"), other, ToolMessage("x", tool_call_id="2")])[1].content == []


def test_a_call_without_an_id_that_could_not_be_read_is_not_sent():
    slip = {"name": "a", "args": "{", "id": None, "error": "cut", "type": "invalid_tool_call"}
    asked = [HumanMessage("q"), AIMessage("", invalid_tool_calls=[slip]), HumanMessage("and?")]
    assert sendable(asked) == [asked[0], asked[2]]
    said, beside = AIMessage("hm", invalid_tool_calls=[slip]), calling(call("a", id="1"))
    beside = beside.model_copy(update={"invalid_tool_calls": [slip]})
    prompt = sendable([asked[0], said, beside, ToolMessage("x", tool_call_id="1")])
    assert [(m.type, m.text) for m in prompt] == [("human", "q"), ("ai", "hm"), ("ai", ""), ("tool", "x")]
    assert not any(m.invalid_tool_calls for m in prompt if m.type == "ai")
    [_, named] = sendable([AIMessage("", invalid_tool_calls=[{**slip, "id": ""}])])
    assert named.type == "tool"


def test_an_id_that_is_made_up_is_nobodys():
    asked = [calling(call("a", id="call_3_0")), ToolMessage("1", tool_call_id="call_3_0")]
    prompt = sendable([HumanMessage("q"), *asked, calling(call("a", id=None)), ToolMessage("2", tool_call_id="")])
    assert [message.tool_call_id for message in prompt if message.type == "tool"] == ["call_3_0", "call_3_0_"]
