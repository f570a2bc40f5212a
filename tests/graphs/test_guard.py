from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from metis_agent.graphs.guard import call_key, earlier_result, echo_of, stuck
from metis_agent.types import ToolOutcome
from tests.fakes import call, calling


def outcome(call_id: str, status: str, **arguments) -> ToolOutcome:
    return ToolOutcome(call_id=call_id, tool="a", arguments=arguments, status=status)


def test_keys_ignore_the_order_of_arguments_and_nothing_else():
    assert call_key("a", {"x": 1, "y": [1, {"p": 2, "q": 3}]}) == call_key("a", {"y": [1, {"q": 3, "p": 2}], "x": 1})
    assert call_key("a", {"x": 1}) != call_key("b", {"x": 1})
    assert call_key("a", {"x": 1}) != call_key("a", {"x": "1"})
    assert call_key("a", {"x": object}) == call_key("a", {"x": object})


def test_only_calls_that_ran_have_a_result():
    key = call_key("a", {"x": 1})
    assert earlier_result(key, [outcome("1", "blocked", x=1), outcome("2", "repeated", x=1)]) is None
    assert earlier_result(key, [outcome("1", "ok", x=2), outcome("2", "error", x=1)]).call_id == "2"


def test_an_echo_says_that_it_is_one():
    text = echo_of(ToolMessage("42", name="a", tool_call_id="1"), "2")
    assert "not run again" in text.content
    assert text.content.endswith("42")
    assert (text.tool_call_id, text.name, text.status) == ("2", "a", "success")
    picture = {"type": "image", "url": "https://example.org/x.png"}
    blocks = echo_of(ToolMessage([picture], name="a", tool_call_id="1", status="error"), "2")
    assert blocks.content[-1] == picture
    assert "not run again" in str(blocks.text)
    assert blocks.status == "error"


def test_a_message_of_blocked_calls_ends_the_turn():
    turn = [HumanMessage("q"), calling(call("a", id="1"), call("a", id="2"))]
    assert "blocked" in stuck(turn, [outcome("1", "blocked"), outcome("2", "blocked")])
    assert stuck(turn, [outcome("1", "blocked"), outcome("2", "ok")]) is None


def test_unreadable_calls_count_as_calls():
    message = AIMessage("", invalid_tool_calls=[{"name": "a", "args": "{", "id": "1", "error": None}])
    assert stuck([HumanMessage("q"), message], [outcome("1", "blocked")])


def test_the_second_fruitless_message_ends_the_turn():
    first, second = calling(call("a", id="1")), calling(call("a", id="2"))
    third = calling(call("a", id="3"), call("b", id="4"))
    ran, repeated = outcome("1", "ok"), outcome("2", "repeated")
    assert stuck([HumanMessage("q"), first, second], [ran, repeated]) is None
    mixed = [ran, repeated, outcome("3", "repeated"), outcome("4", "blocked")]
    assert "repeated" in stuck([HumanMessage("q"), first, second, third], mixed)
    productive = [ran, repeated, outcome("3", "repeated"), outcome("4", "ok")]
    assert stuck([HumanMessage("q"), first, second, third], productive) is None


def test_calls_of_another_agent_are_none_of_ours():
    assert stuck([HumanMessage("q"), calling(call("transfer", id="x"))], []) is None
