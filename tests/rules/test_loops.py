from langchain_core.messages import ToolMessage

from metis_agent.rules.enforcement import call_key, earlier_result, echo_of
from metis_agent.types import ToolOutcome


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
