"""Threads of a LangGraph checkpointer, read from its database."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg
import pytest
from langchain.agents import create_agent
from langgraph.checkpoint.postgres import PostgresSaver
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
        talk(saver)
    return path


def talk(saver):
    """Two turns of one thread, one of another."""
    script = [calling(call("look", id="c", query="Oslo")), "717,710 live there.", "You are welcome."]
    agent = create_agent(model(*script), [look], checkpointer=saver)
    config = {"configurable": {"thread_id": "t-1"}}
    agent.invoke({"messages": [("user", "How many live in Oslo?")]}, config)
    agent.invoke({"messages": [("user", "Thanks.")]}, config)
    agent.invoke({"messages": [("user", "Hello?")]}, {"configurable": {"thread_id": "t-2"}})


@pytest.fixture
def postgres():
    """The address of a database server of its own, at loopback."""
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp())
    other: dict[str, str] = {"user": "nobody"} if os.geteuid() == 0 else {}  # it refuses to run as root
    if other:
        shutil.chown(folder, other["user"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    made = ["initdb", "-D", str(folder / "data"), "-U", "metis", "-A", "trust", "-N"]
    subprocess.run(made, check=True, cwd=folder, capture_output=True, **other)
    options = ["-D", str(folder / "data"), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    server = subprocess.Popen(["postgres", *options], cwd=folder, stderr=subprocess.DEVNULL, **other)
    address = f"postgresql://metis@127.0.0.1:{port}/postgres"
    until = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(address).close()
            break
        except psycopg.OperationalError:
            assert server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
    yield address
    server.terminate()
    server.wait()
    shutil.rmtree(folder)


@pytest.mark.enable_socket
@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_database_of_postgres(postgres, tmp_path):
    with PostgresSaver.from_conn_string(postgres) as saver:
        saver.setup()
        talk(saver)
    with TrajectoryStore(tmp_path / "store") as store:
        report = import_traces([postgres], store)
        first, second, third = sorted(store.read(), key=lambda run: run.id)
        assert (report.format, report.traces, report.trajectories) == ("langgraph", 2, 3)
        assert (first.answer, first.outcomes[0].content) == ("717,710 live there.", "717,710")
        assert (second.answer, third.conversation) == ("You are welcome.", "t-2")
        assert 0 < first.seconds < 60
        with pytest.raises(StorageError, match="the database can't be read"):
            import_traces([postgres.replace("/postgres", "/nothing")], store)


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
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text TEXT)")
    other.close()
    with TrajectoryStore(tmp_path / "store") as store, pytest.raises(StorageError, match="no such table: checkpoints"):
        import_traces([path], store)
