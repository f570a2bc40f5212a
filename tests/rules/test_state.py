import logging

import orjson
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.errors import InvalidUpdateError
from langgraph.types import Overwrite

from metis_agent.rules.state import Records, as_dict, with_question
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

DECISION = GateDecision(allowed=("a", "b"), required=True, probabilities={"a": 0.7, "b": 0.6}, threshold=0.5)
OUTCOME = ToolOutcome(call_id="1", tool="a", arguments={"x": [1, 2]}, status="ok", content="3")
CALL = ModelCall(node="act", step=0, prompt_ids=(1, 2), completion_ids=(3,), log_probs=(-0.5,))


@pytest.mark.parametrize("record", [DECISION, OUTCOME, CALL])
def test_records_survive_a_checkpoint_as_plain_values(record, caplog):
    channel = Records(type(record))
    assert channel.update([[as_dict(record)]])
    serializer = JsonPlusSerializer()
    with caplog.at_level(logging.WARNING):
        stored = serializer.loads_typed(serializer.dumps_typed(channel.checkpoint()))
        written = serializer.loads_typed(serializer.dumps_typed([as_dict(record)]))
    assert not caplog.records  # a class unknown to the serializer would have been warned about
    assert channel.from_checkpoint(stored).get() == [record]
    channel.update([written])
    assert channel.get() == [record, record]


@pytest.mark.parametrize("record", [DECISION, OUTCOME, CALL])
def test_records_are_json(record):
    again = orjson.loads(orjson.dumps(record))
    channel = Records(type(record))
    channel.update([[again]])
    assert channel.get() == [record]


def test_a_channel_appends_or_replaces():
    appending, replacing = Records(ToolOutcome), Records(ToolOutcome, append=False)
    for channel in (appending, replacing):
        channel.update([[as_dict(OUTCOME)]])
        channel.update([[OUTCOME]])
    assert (len(appending.get()), len(replacing.get())) == (2, 1)
    appending.update([Overwrite([])])
    assert appending.get() == []


def test_readers_keep_what_they_read():
    channel = Records(ToolOutcome)
    twin, before = channel.copy(), channel.get()
    channel.update([[OUTCOME]])
    assert before == []
    assert twin.get() == []
    assert not channel.update([])


def test_an_empty_channel_starts_empty():
    channel = Records(ToolOutcome).from_checkpoint(object())  # LangGraph's marker for "never stored"
    assert channel.is_available()
    assert channel.get() == []


def test_channels_are_equal_by_record_and_behaviour():
    assert Records(ToolOutcome) == Records(ToolOutcome)
    assert Records(ToolOutcome) != Records(ToolOutcome, append=False)
    assert Records(ToolOutcome) != Records(ModelCall)


@pytest.mark.parametrize("wrong", [None, "text", {"call_id": "1"}])
def test_other_writes_are_refused(wrong):
    with pytest.raises(InvalidUpdateError, match="ToolOutcome"):
        Records(ToolOutcome).update([wrong])


def test_the_question_is_as_other_code_has_left_it():
    question, shown = HumanMessage("Who is bob@example.com?", id="q"), HumanMessage("[the page]", id="p")
    messages = [HumanMessage("Who is [REDACTED]?", id="q"), AIMessage("I look."), shown]
    assert [message.text for message in with_question(messages, question)] == ["Who is [REDACTED]?", "I look."]
    assert with_question([shown, AIMessage("I look.")], question)[0] is question
