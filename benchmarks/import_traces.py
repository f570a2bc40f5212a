"""Time and memory of `metis import` by the size of the export, and what becomes of it when it is killed; prints JSON.

An export of N LangSmith runs is written, as its client writes them: agents of three to twelve spans with one to four
model calls, a thousand traces at a time in the order in which their spans ended, every thousandth line torn, every
hundredth span twice. Each import runs in a process of its own, for its peak memory. `--kills N` kills it N times at
random and compares the store with that of an import that was left alone.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import import_traces

AT_ONCE, TORN_EVERY, TWICE_EVERY = 1_000, 1_000, 100
PROSE = "The committee read the report of the year before, and found that little in it had changed since. " * 8


def runs(trace: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """The runs of one trace in the order in which they ended: 1 + 2 * rounds + rounds' tools."""
    began = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=trace)
    ids = iter(str(UUID(int=trace << 16 | number)) for number in range(1000))
    root = next(ids)
    said: list[dict[str, Any]] = [message("system", PROSE), message("human", f"Question {trace}: what has changed?")]
    at = began
    rounds = rng.randrange(4)
    for number in range(rounds + 1):
        calls = [{"name": "look", "args": {"query": f"{trace} {number}"}, "id": f"c{number}", "type": "tool_call"}]
        reply = message("ai", "" if number < rounds else f"Nothing, in {rounds} years.")
        reply["kwargs"] |= {
            "tool_calls": calls if number < rounds else [],
            "usage_metadata": {"input_tokens": 200, "output_tokens": 20, "total_tokens": 220},
            "response_metadata": {"model_name": "gpt-x"},
        }
        node, call = next(ids), next(ids)
        more = {"inputs": {"messages": [said]}, "outputs": {"generations": [[{"message": reply}]]}}
        yield run(call, trace, root, [root, node], at, "llm", "ChatOpenAI", **more)
        yield run(node, trace, root, [root], at, "chain", "model", inputs={"messages": said}, outputs={})
        said = [*said, reply]
        at += timedelta(seconds=1)
        if number < rounds:
            found = message("tool", PROSE)
            found["kwargs"] |= {"tool_call_id": f"c{number}", "name": "look"}
            output = {"inputs": {"input": str(calls[0]["args"])}, "outputs": {"output": found}}
            yield run(next(ids), trace, root, [root], at, "tool", "look", **output)
            said = [*said, found]
            at += timedelta(seconds=1)
    yield run(
        root, trace, root, [], began, "chain", "agent", inputs={"messages": said[1:2]}, outputs={"messages": said[1:]}
    )


def message(kind: str, content: str) -> dict[str, Any]:
    name = {"ai": "AIMessage", "human": "HumanMessage", "system": "SystemMessage", "tool": "ToolMessage"}[kind]
    return {
        "lc": 1,
        "type": "constructor",
        "id": ["langchain", "schema", name],
        "kwargs": {"content": content, "type": kind},
    }


def run(
    id_: str, trace: int, root: str, above: list[str], at: datetime, kind: str, name: str, **fields: Any
) -> dict[str, Any]:
    order = ".".join(f"{at:%Y%m%dT%H%M%S%f}Z{each}" for each in [*above, id_])
    return {
        "id": id_, "trace_id": root, "parent_run_id": above[-1] if above else None, "dotted_order": order, "name": name,
        "run_type": kind, "start_time": at.isoformat(), "end_time": (at + timedelta(seconds=0.5)).isoformat(),
        "extra": {"metadata": {"thread_id": f"thread-{trace // 3}", "user_id": f"user-{trace % 97}"}}, **fields,
    }  # fmt: skip


def write_export(path: Path, spans: int, seed: int = 0) -> dict[str, int]:
    """Write the export; returns what is in it."""
    rng = random.Random(seed)
    written = {"spans": 0, "traces": 0, "torn": 0, "twice": 0}
    open_: list[Iterator[dict[str, Any]]] = []
    with path.open("w") as file:
        while written["spans"] < spans:
            while len(open_) < min(AT_ONCE, spans // 10):
                open_.append(runs(written["traces"], rng))
                written["traces"] += 1
            which = rng.randrange(len(open_))
            span = next(open_[which], None)
            if span is None:
                open_[which] = open_[-1]
                open_.pop()
                continue
            line = json.dumps(span)
            file.write(line + "\n")
            written["spans"] += 1
            if written["spans"] % TWICE_EVERY == 0:
                file.write(line + "\n")
                written["twice"] += 1
            if written["spans"] % TORN_EVERY == 0:
                file.write(line[: len(line) // 2] + "\n")
                written["torn"] += 1
    return written


def measured(export: Path, store: Path) -> dict[str, Any]:
    """Import in this process; seconds, peak memory and counts."""
    began = time.perf_counter(), time.process_time()
    with TrajectoryStore(store) as kept:
        report = import_traces([export], kept)
    seconds, cpu_seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    counts = ("records", "traces", "trajectories", "tool_calls", "rejected", "handled", "reasons")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_gib": peak,
        **{name: getattr(report, name) for name in counts},
    }


def child(export: Path, store: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.import_traces", "--child", str(export), str(store)], stdout=subprocess.PIPE
    )


def killed(export: Path, folder: Path, kills: int, seconds: float) -> dict[str, Any]:
    """Import, killed so many times at random moments of its course; is the result the same?"""
    rng = random.Random(1)
    store = folder / "killed"
    done = 0
    for _ in range(kills):
        process = child(export, store)
        try:
            process.wait(timeout=rng.uniform(0.15, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.communicate()
    last = json.loads(child(export, store).communicate()[0])
    alone = {trajectory.id: trajectory for trajectory in TrajectoryStore(folder / "store", read_only=True).read()}
    again = list(TrajectoryStore(store, read_only=True).read())
    same = len(again) == len(alone) and all(alone.get(trajectory.id) == trajectory for trajectory in again)
    return {"kills": done, "same": same, "trajectories": len(again), "counts": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kills", type=int, default=0, help="kill the smallest import so often")
    parser.add_argument(
        "--folder", type=Path, help="where exports and stores are written; a temporary folder by default"
    )
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*options.child)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for spans in options.spans:
            export = folder / f"{spans}.jsonl"
            written = write_export(export, spans)
            figures = json.loads(child(export, folder / "store").communicate()[0])
            size = export.stat().st_size / 2**20
            line = {"written": written, "mib": size, **figures, "spans_per_cpu_second": spans / figures["cpu_seconds"]}
            if options.kills and spans == min(options.spans):
                line["killed"] = killed(export, folder, options.kills, figures["seconds"])
            print(json.dumps(line), flush=True)
            export.unlink()
            subprocess.run(["rm", "-rf", str(folder / "store"), str(folder / "killed")], check=True)


if __name__ == "__main__":
    main()
