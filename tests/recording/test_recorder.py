"""From runs to trajectories."""

import asyncio
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from metis_agent.agent import create_metis_agent
from metis_agent.errors import InputError, SandboxGoneError, StorageError
from metis_agent.gates import BranchGate, NeverGate, ShadowGate
from metis_agent.middleware import MetisGateMiddleware
from metis_agent.recording.recorder import (
    Recorder,
    RecorderReport,
    definitions_of,
    model_call_of,
    outcomes_as_told,
    question_of,
    trajectory_of,
)
from metis_agent.recording.shards import Storage
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.tools.redaction import Redactor
from metis_agent.traces import steps_of
from metis_agent.types import TOKEN_RECORD, ModelCall, Question, ToolOutcome, Trajectory
from tests.fakes import call, calling, model

TOKENS = {
    "prompt_ids": [1, 2, 3],
    "completion_ids": [4, 5],
    "log_probs": [-0.1, -0.2],
    "forced": 1,
    "sampling": {"temperature": 1.0},
    "weights_version": "w",
    "template_hash": "t",
    "continues": True,
}


class Kept:
    """A store in memory."""

    def __init__(self):
        self.trajectories = []

    def append(self, trajectory):
        self.trajectories.append(trajectory)


@pytest.mark.parametrize("host", ["graph", "middleware", "shadow"])
def test_a_record_says_what_the_model_was_offered_and_told(host):
    kept, asked = Kept(), model("Done.", "Done.")
    recorder = Recorder(kept)
    looking = tool(look.func)
    looking.metadata = {"read_only": True}
    if host == "graph":
        agent = create_metis_agent(asked, [looking], recorder=recorder, system_prompt="Be brief.")
    else:
        gate = ShadowGate(NeverGate()) if host == "shadow" else BranchGate("free")
        agent = create_agent(
            asked, [looking], system_prompt="Be brief.", middleware=[MetisGateMiddleware(gate, recorder=recorder)]
        )
    agent.invoke({"messages": [("user", "x?")]})
    agent.invoke({"messages": [("user", "y?")]})
    first, second = kept.trajectories
    (definition,) = first.tools
    assert first.tools is second.tools  # made once
    assert definition["function"]["name"] == "look"
    assert definition["read_only"] is True
    assert definition["function"]["description"] == "Look it up."
    assert list(definition["function"]["parameters"]["properties"]) == ["query"]
    assert [message["type"] for message in first.history] == ["system"]
    assert steps_of(first)[0].messages[0].text == "Be brief."


def test_a_tool_that_cannot_be_described_is_named(caplog):
    @tool
    def odd(query: str) -> str:
        """Odd."""
        return query

    object.__setattr__(odd, "args_schema", 7)
    assert definitions_of([odd, {"type": "web_search"}])[0]["function"]["name"] == "odd"
    assert "without its schema" in caplog.text


@tool
def look(query: str) -> str:
    """Look it up."""
    if query == "gone":
        raise SandboxGoneError("the sandbox died")
    return f"found {query}"


@pytest.fixture
def kept():
    return Kept()


@pytest.fixture(params=["sync", "async"])
def run(request):
    def run(agent, text="q", config=None):
        state = {"messages": [HumanMessage(text)]}
        return asyncio.run(agent.ainvoke(state, config)) if request.param == "async" else agent.invoke(state, config)

    return run


def test_a_model_call_keeps_its_tokens():
    message = AIMessage(
        "hm",
        tool_calls=[call("look", query="x")],
        response_metadata={TOKEN_RECORD: TOKENS},
        usage_metadata={"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "input_token_details": {"cache": 1}},
    )
    record = model_call_of(message, "act", 2)
    assert (record.node, record.step, record.text, record.forced, record.continues) == ("act", 2, "hm", 1, True)
    assert (record.prompt_ids, record.completion_ids, record.log_probs) == ((1, 2, 3), (4, 5), (-0.1, -0.2))
    assert record.tool_calls[0]["name"] == "look"
    assert record.usage == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    assert model_call_of(AIMessage("x"), "act", 0).prompt_ids is None


def test_a_trajectory_is_made_of_the_latest_turn():
    reply = AIMessage("new", response_metadata={TOKEN_RECORD: TOKENS, "model_name": "m"})
    state = {"messages": [HumanMessage("old"), AIMessage("old too"), HumanMessage("q"), reply]}
    trajectory = trajectory_of(state, id="1", question=Question(id="q", text="q"), started_at=5.0, seconds=2.0)
    assert [message["type"] for message in trajectory.messages] == ["human", "ai"]
    assert [message["data"]["content"] for message in trajectory.history] == ["old", "old too"]
    assert trajectory.messages[1]["data"]["response_metadata"] == {"model_name": "m"}
    assert TOKEN_RECORD in reply.response_metadata
    assert (trajectory.answer, trajectory.status, trajectory.seconds) == ("new", "finished", 2.0)


def test_a_partial_state_will_do():
    trajectory = trajectory_of(
        {"messages": []}, id="1", question=Question(id="q", text="q"), started_at=0.0, status="failed", error="gone"
    )
    assert (trajectory.answer, trajectory.messages, trajectory.calls, trajectory.error) == ("", (), (), "gone")


def test_the_same_text_is_the_same_question():
    one, two = question_of([HumanMessage("q", id="1")]), question_of([AIMessage("x"), HumanMessage("q", id="2")])
    assert one == two
    assert one.id != question_of([HumanMessage("other")]).id


def test_every_turn_is_recorded(run, kept):
    def script(messages):
        if isinstance(messages[-1], ToolMessage):
            return AIMessage("x it is", response_metadata={TOKEN_RECORD: TOKENS})
        return calling(call("look", query="x"))

    agent = create_metis_agent(model(script), [look], recorder=Recorder(kept, metadata={"where": "here"}))
    assert "record" in agent.get_graph().nodes
    state = run(agent)
    run(agent)
    first, second = kept.trajectories
    assert first.id != second.id
    assert first.question == second.question == question_of([HumanMessage("q")])
    assert (first.answer, first.status, first.branch, first.tool_calls) == ("x it is", "finished", "free", 1)
    assert [item.node for item in first.calls] == ["act", "act"]
    assert first.calls[1].completion_ids == (4, 5)
    assert first.decisions == tuple(state["decisions"])
    assert first.metadata == {"where": "here"}
    assert 0 < first.seconds < 5
    assert first.started_at > 1e9
    json.dumps(first.messages)


def test_ids_branches_and_threads(run, kept):
    agent = create_metis_agent(
        model("ok"), [look], gate=BranchGate("direct"), recorder=Recorder(kept), checkpointer=InMemorySaver()
    )
    for number in (1, 2):
        name = f"00000000-0000-0000-0000-00000000000{number}"
        run(agent, f"q{number}", {"configurable": {"thread_id": "t"}, "run_id": name})
    assert [trajectory.id[-1] for trajectory in kept.trajectories] == ["1", "2"]
    assert [trajectory.branch for trajectory in kept.trajectories] == ["direct", "direct"]
    assert [len(trajectory.calls) for trajectory in kept.trajectories] == [1, 1]
    assert [trajectory.question.text for trajectory in kept.trajectories] == ["q1", "q2"]
    assert [trajectory.conversation for trajectory in kept.trajectories] == ["t", "t"]
    # What the model had read before the turn is there to be asked from again (`metis audit`).
    assert [len(trajectory.history) for trajectory in kept.trajectories] == [0, 2]
    assert [message.text for message in steps_of(kept.trajectories[1])[0].messages] == ["q1", "ok", "q2"]


def test_two_turns_of_one_outer_run_have_two_ids(run, kept):
    builder = StateGraph(MessagesState)
    for name in ("one", "two"):
        builder.add_node(name, create_metis_agent(model(name), recorder=Recorder(kept)))
    builder.add_edge(START, "one")
    builder.add_edge("one", "two")
    run(builder.compile(), config={"run_id": "00000000-0000-0000-0000-000000000001"})
    assert len({trajectory.id for trajectory in kept.trajectories}) == 2


@pytest.mark.parametrize("budget", [Budget(), Budget(calls=1)])
def test_a_model_that_fails_leaves_a_failed_trajectory(run, kept, budget):
    chat = model(calling(call("look", query="x")), ConnectionError("no route"))
    agent = create_metis_agent(chat, [look], recorder=Recorder(kept), budget=budget)
    with pytest.raises(ConnectionError, match="no route"):
        run(agent)
    (trajectory,) = kept.trajectories
    assert (trajectory.status, trajectory.error, trajectory.answer) == ("failed", "ConnectionError: no route", "")
    assert trajectory.tool_calls == 1
    assert len(trajectory.messages) == 3
    assert len(trajectory.calls) == 1


def test_an_infrastructure_failure_in_a_tool_leaves_a_failed_trajectory(run, kept):
    agent = create_metis_agent(model(calling(call("look", query="gone"))), [look], recorder=Recorder(kept))
    with pytest.raises(SandboxGoneError):
        run(agent)
    (trajectory,) = kept.trajectories
    assert (trajectory.status, trajectory.error) == ("failed", "SandboxGoneError: the sandbox died")
    assert [message["type"] for message in trajectory.messages] == ["human", "ai"]


def frame(artifact):
    @tool(response_format="content_and_artifact")
    def frame(query: str):
        """A table."""
        return "3 rows", artifact

    return frame


@pytest.mark.parametrize(
    "artifact",
    [np.arange(3), b"\x89PNG\xff", print, object(), {"nested": [object()]}, iter([1]), Question, float("nan"), "\ud83d",
     10**5000],
    ids=lambda artifact: type(artifact).__name__,
)  # fmt: skip
@pytest.mark.parametrize("host", ["graph", "middleware"])
def test_an_artifact_of_any_kind_costs_neither_answer_nor_record(run, tmp_path, artifact, host):
    recorder = Recorder(TrajectoryStore(tmp_path))
    chat = model(calling(call("frame", query="x")), "done")
    if host == "graph":
        agent = create_metis_agent(chat, [frame(artifact)], recorder=recorder)
    else:
        gate = MetisGateMiddleware(ShadowGate(NeverGate()), recorder=recorder)
        agent = create_agent(chat, [frame(artifact)], middleware=[gate])
    assert run(agent)["messages"][-1].text == "done"
    (trajectory,) = TrajectoryStore(tmp_path, read_only=True).read()
    assert (trajectory.answer, trajectory.tool_calls, trajectory.outcomes[0].content) == ("done", 1, "3 rows")
    assert recorder.report == RecorderReport(recorded=1)


def test_half_an_emoji_is_a_question(run, tmp_path):
    agent = create_metis_agent(model("ok"), recorder=Recorder(TrajectoryStore(tmp_path)))
    run(agent, "What does \ud83d mean?")
    (trajectory,) = TrajectoryStore(tmp_path).read()
    assert trajectory.question == question_of([HumanMessage("What does \ud83d mean?")])


class Full:
    """A store that is out of order until it is mended."""

    def __init__(self, error=StorageError("No space left on device")):
        self.error, self.kept = error, []

    def append(self, trajectory):
        if self.error:
            raise self.error
        self.kept.append(trajectory)


@pytest.mark.parametrize("error", [StorageError("No space left"), ZeroDivisionError(), MemoryError(), InputError("no")])
def test_a_store_that_is_full_costs_no_answer(run, error, caplog):
    recorder = Recorder(Full(error))
    agent = create_metis_agent(model("an answer"), recorder=recorder)
    assert run(agent)["messages"][-1].text == "an answer"
    assert (recorder.report.recorded, recorder.report.spooled, recorder.report.lost) == (0, 0, 1)
    assert recorder.report.reason.startswith(type(error).__name__)
    assert "could not be recorded" in caplog.text


def test_what_the_store_does_not_take_is_in_the_spool(run, tmp_path, caplog):
    store = Full()
    recorder = Recorder(store, spool=tmp_path / "spool")
    agent = create_metis_agent(model("ok"), recorder=recorder)
    run(agent, "q1")
    run(agent, "q2")
    store.error = None
    run(agent, "q3")
    assert recorder.report == RecorderReport(recorded=1, spooled=2, reason="StorageError: No space left on device")
    assert [kept.question.text for kept in store.kept] == ["q3"]
    for trajectory in TrajectoryStore(tmp_path / "spool").read():
        store.append(trajectory)
    assert [kept.question.text for kept in store.kept] == ["q3", "q1", "q2"]


def test_a_spool_that_can_not_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="can't be written"):
        Recorder(Full(), spool=tmp_path / "file")


def test_a_full_spool_is_counted_and_the_answer_given(run, tmp_path, monkeypatch):
    recorder = Recorder(Full(), spool=tmp_path)
    monkeypatch.setattr("metis_agent.recording.shards.LocalShards.append", lambda *_, **__: 1 / 0)
    assert run(create_metis_agent(model("ok"), recorder=recorder))["messages"][-1].text == "ok"
    assert (recorder.report.lost, recorder.report.spooled) == (1, 0)


def test_a_turn_that_is_too_large_is_recorded_without_its_messages(run, tmp_path, monkeypatch):
    monkeypatch.setattr("metis_agent.recording.store._MAX_LINE", 30_000)
    recorder = Recorder(TrajectoryStore(tmp_path))
    run(create_metis_agent(model("a" * 40_000), recorder=recorder), "q" * 40_000)
    (trajectory,) = TrajectoryStore(tmp_path).read()
    assert (trajectory.answer, trajectory.question.text, trajectory.messages) == ("a" * 10_000, "q" * 10_000, ())
    assert "a line holds at most 30000" in trajectory.metadata["not_recorded"]
    assert recorder.report.recorded == 1


KEY = "AIza" + "SyA1234567890abcdefghijklmnopqrstuv"


def test_keys_leave_what_is_said_of_failures(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GATEWAY_PASS", "quite-plain-words")
    chat = model(RuntimeError(f"403 for 'https://a.example/x?key={KEY}', quite-plain-words"))
    with pytest.raises(RuntimeError, match=KEY):  # the caller's own, as it was
        run(create_metis_agent(chat, recorder=Recorder(TrajectoryStore(tmp_path))))
    (trajectory,) = TrajectoryStore(tmp_path).read()
    assert trajectory.error == "RuntimeError: 403 for 'https://a.example/x?key=[redacted]', [redacted]"
    Recorder(Full(StorageError(f"denied: token={KEY}"))).record({"messages": [HumanMessage("q")]})
    assert "denied" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("content", "recorded"),
    [([], ""), ([{"type": "text", "text": ""}], ""), ([{"type": "image_url", "image_url": "data:,"}], ""),
     ([{"type": "custom_tool_call_output", "output": "[gone]"}], "[gone]"), ("left", "left")],
)  # fmt: skip
def test_a_result_is_recorded_as_its_message_has_it(content, recorded):
    outcome = ToolOutcome(call_id="1", tool="look", arguments={}, content="a secret", status="ok")
    turn = [HumanMessage("q"), calling(call("look", id="1")), ToolMessage(content, tool_call_id="1")]
    assert [it.content for it in outcomes_as_told(turn, [outcome])] == [recorded]


def test_a_redactor_takes_secrets_out_of_the_whole_record(run, tmp_path):
    secret = "a plain value"
    reply = AIMessage(f"it is {secret}", response_metadata={TOKEN_RECORD: TOKENS, "raw": {"headers": secret}})
    chat = model(calling(call("look", query=secret)), reply)
    recorder = Recorder(TrajectoryStore(tmp_path), metadata={"by": secret}, redactor=Redactor(secrets=[secret]))
    agent = create_metis_agent(chat, [look], recorder=recorder)
    assert secret in run(agent, f"what of {secret}?")["messages"][-1].text
    (line,) = [path.read_text() for path in tmp_path.glob("segment*")]
    assert secret not in line
    (trajectory,) = TrajectoryStore(tmp_path).read()
    assert trajectory.calls[1].prompt_ids is None  # they spell it
    assert trajectory.question == question_of([HumanMessage("what of [redacted]?")])
    run(agent, "nothing of it")
    assert list(TrajectoryStore(tmp_path).read())[1].calls[0].completion_ids is None


def test_the_record_says_what_the_messages_say_after_middleware_was_at_them():
    reply = calling(call("look", id="1", query="[NAME]"))
    turn = [HumanMessage("q"), reply, ToolMessage("mail: [MAIL]", tool_call_id="1"), AIMessage("done, [MAIL]")]
    outcome = ToolOutcome(
        call_id="1", tool="look", arguments={"query": "Ann"}, status="ok", content="mail: ann@a.example"
    )
    calls = [
        ModelCall(node="act", step=0, text="for Ann", tool_calls=(call("look", id="1", query="Ann"),)),
        ModelCall(node="act", step=1, text="done, ann@a.example"),
    ]
    state = {"messages": turn, "outcomes": [outcome], "calls": calls}
    trajectory = trajectory_of(state, id="t", question=Question(id="q", text="q"), started_at=0.0)
    assert "ann" not in str(trajectory).lower().replace("channel", "")


def test_turns_on_another_file_system_are_there_at_once_and_go_up_together(monkeypatch):
    url = f"memory://{uuid.uuid4().hex}"
    store = TrajectoryStore(url)
    put, calls = Storage.put, []

    def slow(self, name, content):
        calls.append(name)
        time.sleep(0.05)
        put(self, name, content)

    monkeypatch.setattr(Storage, "put", slow)
    recorder = Recorder(store)
    with ThreadPoolExecutor(30) as pool:
        list(pool.map(lambda n: recorder.record({"messages": [HumanMessage(f"q{n}")]}), range(30)))
    assert len(list(TrajectoryStore(url, read_only=True).read())) == 30  # nothing was flushed or closed
    assert len(calls) < 15
    gathering = Recorder(store, wait=False)
    gathering.record({"messages": [HumanMessage("later")]})
    assert len(list(TrajectoryStore(url, read_only=True).read())) == 30
    store.flush()
    assert len(list(TrajectoryStore(url, read_only=True).read())) == 31


def test_an_upload_that_fails_is_told_to_all_who_wait_for_it(monkeypatch, tmp_path):
    store = TrajectoryStore(f"memory://{uuid.uuid4().hex}")
    store.append(Trajectory(id="gathered", question=Question(id="q", text="q")))

    def down(*_):
        time.sleep(0.05)
        raise StorageError("503 Slow Down")

    recorder = Recorder(store, spool=tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(Storage, "put", down)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: recorder.record({"messages": [HumanMessage(f"q{n}")]}, run_id=str(n)), range(8)))
    assert (recorder.report.recorded, recorder.report.spooled) == (0, 8)
    store.close()
    assert [kept.id for kept in store.read()] == ["gathered"]
    assert TrajectoryStore(tmp_path).ids() == {str(n) for n in range(8)}


def test_a_store_that_fails_does_not_hide_the_failure(run, kept, caplog):
    kept.append = lambda trajectory: 1 / 0
    agent = create_metis_agent(model(ConnectionError("no route")), recorder=Recorder(kept))
    with pytest.raises(ConnectionError):
        run(agent)
    assert "could not be recorded" in caplog.text


def test_token_records_are_kept_without_a_recorder_too(run):
    chat = model(AIMessage("ok", response_metadata={TOKEN_RECORD: TOKENS}))
    assert run(create_metis_agent(chat))["calls"][0].prompt_ids == (1, 2, 3)
    assert run(create_metis_agent(chat, record_calls=False))["calls"] == []
    assert len(run(create_metis_agent(model("ok"), record_calls=True))["calls"]) == 1


def test_trajectories_come_back_from_disk(run, tmp_path):
    store = TrajectoryStore(tmp_path)
    twice = calling(call("look", id="1", query="x"), call("look", id="2", query="x"))
    chat = model(twice, AIMessage("ok", response_metadata={TOKEN_RECORD: TOKENS}))
    state = run(create_metis_agent(chat, [look], recorder=Recorder(store)))
    (trajectory,) = store.read()
    assert (trajectory.answer, trajectory.calls[1].prompt_ids, trajectory.tool_calls) == ("ok", (1, 2, 3), 1)
    assert trajectory.decisions == tuple(state["decisions"])
    assert trajectory.outcomes == tuple(state["outcomes"])
    assert sorted(outcome.status for outcome in trajectory.outcomes) == ["ok", "repeated"]
