"""Threads of a LangGraph checkpointer, read from its database."""

from __future__ import annotations

import time

import pytest
from langchain.agents import create_agent
from langgraph.checkpoint.sqlite import SqliteSaver

from metis_agent.errors import StorageError
from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import import_traces, steps_of
from tests.fakes import call, calling, model
from tests.traces.agents import look


@pytest.fixture
def threads(tmp_path):
    path = tmp_path / "checkpoints.sqlite"
    with SqliteSaver.from_conn_string(str(path)) as saver:
        script = [calling(call("look", id="c", query="Oslo")), "717,710 live there.", "You are welcome."]
        agent = create_agent(model(*script), [look], checkpointer=saver)
        config = {"configurable": {"thread_id": "t-1"}}
        agent.invoke({"messages": [("user", "How many live in Oslo?")]}, config)
        agent.invoke({"messages": [("user", "Thanks.")]}, config)
        agent.invoke({"messages": [("user", "Hello?")]}, {"configurable": {"thread_id": "t-2"}})
    return path


def test_each_turn_of_each_thread_with_its_times(threads, tmp_path):
    before = threads.read_bytes()
    with TrajectoryStore(tmp_path / "store") as store:
        report = import_traces([threads], store)
        again = import_traces([threads], store)
        first, second, third = sorted(store.read(), key=lambda run: run.id)
    assert (report.format, report.traces, report.trajectories) == ("langgraph", 2, 3)
    assert (again.trajectories, again.duplicates) == (0, 3)
    assert [run.id for run in (first, second, third)] == [f"langgraph/{id}" for id in ("t-1/0", "t-1/1", "t-2/0")]
    assert (first.answer, first.outcomes[0].content) == ("717,710 live there.", "717,710")
    assert [message["type"] for message in second.history] == ["human", "ai", "tool", "ai"]
    assert len(steps_of(first)) == 2
    assert 0 < first.seconds < 60
    assert time.time() - 120 < first.started_at < second.started_at <= time.time()
    assert threads.read_bytes() == before


def test_another_database_is_refused(tmp_path):
    import sqlite3

    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text TEXT)")
    other.close()
    with TrajectoryStore(tmp_path / "store") as store, pytest.raises(StorageError, match="no such table: checkpoints"):
        import_traces([path], store)
