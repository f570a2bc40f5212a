"""From a store of 10,000, 100,000 and a million trajectories to outcomes: seconds, and the most memory held.

The trajectories are as large as real ones (about 3 KB) and ask as many questions as four runs each make, up to the
room of a pool. Every size is read in a process of its own. Prints JSON; the store is deleted afterwards.

    python benchmarks/store.py [--sizes 10000 100000 1000000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from metis_agent.recording import schema
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.recorded import OutcomePool
from metis_agent.types import GateDecision, ModelCall, Question, ToolOutcome, Trajectory

BRANCHES = ("direct", "direct", "python", "text_search")
"""Of every question; which makes two tools."""
_NUMBER, _SEGMENT = "8642097531", 20_000


def example(branch: str) -> Trajectory:
    """A run of about 3 KB, its question a sum of a number that `lines` replaces."""
    outcomes = () if branch == "direct" else (
        ToolOutcome(call_id="call_1", tool=branch, arguments={"code": "1 + 1"}, status="ok", content="x" * 300),
    )  # fmt: skip
    message = {"type": "ai", "data": {"content": "x" * 300, "additional_kwargs": {}, "response_metadata": {"m": "n"}}}
    ids = tuple(range(1000, 1060))
    call = ModelCall(node="answer", step=0, prompt_ids=ids, completion_ids=ids[:40], log_probs=(-0.12345678,) * 40)
    return Trajectory(
        id=f"run/{_NUMBER}/{branch}",
        question=Question(
            id=f"q-{_NUMBER}", text=f"How much is {_NUMBER} and two hundred, to the last digit?", answer=_NUMBER,
            verifier="numeric",
        ),
        answer=f"The answer is {_NUMBER}",
        messages=(message, message, message),
        calls=(call,) if branch == "direct" else (call, call),
        decisions=(GateDecision(allowed=() if branch == "direct" else (branch,), required=branch != "direct"),),
        outcomes=outcomes,
        seconds=1.25,
        metadata={"model": "example", "forced": branch},
    )  # fmt: skip


def lines(first: int, end: int) -> Iterator[bytes]:
    """Lines number `first` to `end` of an endless store; every third answer is wrong."""
    templates = [schema.dumps(example(branch)) + "\n" for branch in BRANCHES]
    wrong = [text.replace(f"answer is {_NUMBER}", "answer is 7") for text in templates]
    for index in range(first, end):
        number, place = divmod(index, len(BRANCHES))
        text = (wrong if (number + place) % 3 == 0 else templates)[place]
        yield text.replace(_NUMBER, str(10**9 + number)).encode()


def write(folder: Path, count: int) -> None:
    for first in range(0, count, _SEGMENT):
        with TrajectoryStore(folder) as store:
            store.append(example("direct"))  # begins a shard, as the store names them
        with max(folder.glob("*.jsonl")).open("wb") as file:
            file.writelines(lines(first, min(count, first + _SEGMENT)))


def read(folder: Path) -> dict[str, Any]:
    """What this process needs to make a table of the store, and to sum it up."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.process_time()
    pool = OutcomePool().extend(TrajectoryStore(folder, read_only=True).read(whole=False))
    pooled = time.process_time() - started
    table = pool.table()
    accuracy = dict(zip(table.actions, table.correct.mean(axis=0).tolist(), strict=True))
    return {
        "runs": pool.runs,
        "questions": len(table),
        "accuracy": accuracy,
        "cpu_seconds": time.process_time() - started,
        "pool_cpu_seconds": pooled,
        "imports_mib": base,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the stores are made; a temporary folder by default")
    parser.add_argument("--read", type=Path, help="read this store and print what it took")
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read)))
        return
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for size in arguments.sizes:
            folder = Path(scratch) / str(size)
            write(folder, size)
            gib = sum(path.stat().st_size for path in folder.iterdir()) / 2**30
            started = time.perf_counter()
            child = subprocess.run(
                [sys.executable, __file__, "--read", str(folder)], check=True, capture_output=True, text=True
            )
            seconds = time.perf_counter() - started
            results.append({**json.loads(child.stdout), "seconds": seconds, "store_gib": gib})
            shutil.rmtree(folder)
            print(f"{size:,} trajectories: {results[-1]}", file=sys.stderr)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
