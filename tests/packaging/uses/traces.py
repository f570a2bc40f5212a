"""A bulk export in Parquet and the threads of a checkpointer, by the command line."""

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph

from metis_agent.recording.store import TrajectoryStore

said = {"generations": [[{"message": {"type": "ai", "content": "Oslo."}}]]}
run = {
    "id": "r1", "trace_id": "r1", "run_type": "llm", "name": "model", "start_time": "2026-01-01T00:00:00Z",
    "end_time": "2026-01-01T00:00:01Z", "outputs": json.dumps(said),
    "inputs": json.dumps({"messages": [[{"type": "human", "content": "Where?"}]]}),
}  # fmt: skip
pq.write_table(pa.Table.from_pylist([run]), "export.parquet")
with SqliteSaver.from_conn_string("checkpoints.sqlite") as saver:
    graph = StateGraph(MessagesState)
    graph.add_node("answer", lambda state: {"messages": [("ai", "Oslo.")]})
    graph.add_edge(START, "answer")
    agent = graph.compile(checkpointer=saver)
    agent.invoke({"messages": [("user", "Where?")]}, {"configurable": {"thread_id": "t"}})
for source in ("export.parquet", "checkpoints.sqlite"):
    subprocess.run(["metis", "import", source, "--store", "runs"], check=True)
assert [trajectory.answer for trajectory in TrajectoryStore("runs").read()] == ["Oslo.", "Oslo."]
assert Path("runs/imports").is_dir()
