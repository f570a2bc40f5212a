from dataclasses import replace

from langchain_core.messages import ToolMessage

from metis_agent.rules.enforcement import call_key, earlier_result, echo_of, progress_of
from metis_agent.rules.state import new_notes
from metis_agent.types import ToolOutcome


def outcome(call_id: str, status: str, **arguments) -> ToolOutcome:
    return ToolOutcome(call_id=call_id, tool="a", arguments=arguments, status=status)


def test_keys_ignore_the_order_of_arguments_and_nothing_else():
    assert call_key("a", {"x": 1, "y": [1, {"p": 2, "q": 3}]}) == call_key("a", {"y": [1, {"q": 3, "p": 2}], "x": 1})
    assert call_key("a", {"x": 1}) != call_key("b", {"x": 1})
    assert call_key("a", {"x": 1}) != call_key("a", {"x": "1"})
    assert call_key("a", {"x": object}) == call_key("a", {"x": object})


def test_only_what_ran_last_and_alone_has_a_result_that_still_holds():
    key = call_key("a", {"x": 1})
    assert earlier_result(key, []) is None
    assert earlier_result(key, [outcome("2", "error", x=1)]).call_id == "2"
    # What ran beside it may have changed what it would find now.
    assert earlier_result(key, [outcome("1", "ok", x=2), outcome("2", "ok", x=1)]) is None


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


def test_a_round_that_brings_nothing_new_counts_and_a_new_result_begins_anew():
    notes, said = new_notes([], None), []
    for number, result in enumerate(["1 failed", "1 failed", "1 failed", "passed", *["passed"] * 3]):
        ran = replace(outcome(str(number), "ok", command="pytest"), content=result)
        notes = {**notes, **progress_of(notes, [ran], [])}
        said.append((notes["stale"], bool(notes["loop"])))
    assert said == [(0, False), (1, False), (2, False), (0, False), (1, False), (2, False), (3, True)]
    assert progress_of({**notes, "polls": True}, [ran], [])["stale"] == 0


def test_pictures_are_compared_too():
    def round_of(url, notes):
        message = ToolMessage([{"type": "image", "url": url}], name="a", tool_call_id="1")
        return progress_of(notes, [outcome("1", "ok")], [message])

    notes = new_notes([], None)
    notes = {**notes, **round_of("https://example.org/1.png", notes)}
    assert round_of("https://example.org/2.png", notes)["stale"] == 0
    assert round_of("https://example.org/1.png", notes)["stale"] == 1
