from langchain_core.messages import HumanMessage, ToolMessage

from metis_agent.graphs.orphans import with_all_results
from tests.fakes import call, calling


def test_a_whole_conversation_stays_the_same_object():
    messages = [HumanMessage("q"), calling(call("a", id="1")), ToolMessage("x", tool_call_id="1")]
    assert with_all_results(messages) is messages
    assert with_all_results(messages[:1]) == messages[:1]


def test_every_lost_call_gets_a_message_right_after_it():
    lost = calling(call("a", id="1"), call("b", id="2"))
    lost.invalid_tool_calls = [{"name": None, "args": "", "id": "3", "error": None}]
    messages = [HumanMessage("q"), lost, ToolMessage("x", tool_call_id="2"), HumanMessage("again")]
    mended = with_all_results(messages)
    assert [getattr(message, "tool_call_id", None) for message in mended] == [None, None, "1", "3", "2", None]
    assert mended[2].status == "error"
    assert len(messages) == 4
