"""Exports of LangSmith as its client writes them, by hand, and the import of a file."""

from __future__ import annotations

import json
from pathlib import Path

from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import import_traces


def run(trace, number, kind="llm", **fields):
    """A LangSmith run as its client writes one: the facts that a test is about, no more."""
    fields = {
        "parent_run_id": None if number == 0 else f"{trace}-0",
        "end_time": f"2026-01-01T00:00:{number + 1:02}Z",
        **fields,
    }
    return {
        "id": f"{trace}-{number}", "trace_id": f"{trace}-0", "run_type": kind, "name": kind,
        "start_time": f"2026-01-01T00:00:{number:02}Z", **fields,
    }  # fmt: skip


def asked(trace, text="Who?"):
    return {"messages": [[{"type": "human", "content": text}]]}


def said(content="Ann.", *calls):
    return {"generations": [[{"message": {"type": "ai", "content": content, "tool_calls": list(calls)}}]]}


def whole(trace, text="Who?"):
    """A trace of two runs."""
    return [run(trace, 0, "chain", inputs={}, outputs={}), run(trace, 1, inputs=asked(trace, text), outputs=said())]


def lines(*records):
    return "".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records)


def rejects(report):
    return [json.loads(line) for line in Path(report.rejects).read_text().splitlines()]


def imported_from(folder, content, name="export.jsonl", **options):
    """The report of an import, and the store's trajectories by id."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with TrajectoryStore(folder / "store") as store:
        report = import_traces([folder / name], store, **options)
        return report, sorted(store.read(), key=lambda trajectory: trajectory.id)
