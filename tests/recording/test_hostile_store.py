"""A store with lines of every bad kind is read, reported, curated and trained from: none is fatal, all are counted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from metis_agent.recording import TrajectoryStore, dumps
from metis_agent.types import Question, ToolOutcome, Trajectory

TOOL = "a[/x]b\x1bcEVIL\u202e"
"""Markup, an escape sequence, a character that turns the writing round."""


def run(i: int, branch: str, **fields: object) -> Trajectory:
    rolled = random.Random(f"{i} {branch}").random()
    right = not i % 2 if branch == "direct" else rolled < 0.9
    outcomes = (ToolOutcome(call_id="c", tool=TOOL, arguments={}, status="ok"),) if branch == "tool" else ()
    question = Question(
        id=f"q{i}", text=f"What is {i} {'times' if i % 2 else 'plus'} {i * 7}?", answer="1", verifier="numeric"
    )
    made = {"id": f"{branch}-{i}", "branch": branch, "answer": "1" if right else "2", "question": question}
    return Trajectory(**{**made, "outcomes": outcomes, **fields})  # type: ignore[arg-type]


def text(**fields: object) -> bytes:
    return json.dumps(json.loads(dumps(run(0, "free"))) | fields).encode()


def nested(levels: int) -> bytes:
    return text(metadata={"n": "@"}).replace(b'"@"', b"[" * levels + b"]" * levels)


BAD: dict[str, bytes] = {
    "no JSON": b"GET / HTTP/1.1\r",
    "NUL": b"\x00" * 4096,
    "no UTF-8": text(answer="@").replace(b"@", b"\xff\xfe"),
    "a byte order mark": b"\xef\xbb\xbf" + text()[1:],
    "raw control characters": text(answer="@").replace(b"@", b"\x1b\x00"),
    "two records": text() + text(),
    "half a record": text()[:100],
    "another thing": b"[1, 2, 3]",
    "no version": text(schema=None),
    "a long version": text(schema="9" * 100_000),
    "a version that nobody will reach": text(schema=10**30),
    "an unknown branch": text(branch="sideways"),
    "wrong types": text(calls=[1] * 100_000, outcomes="all"),
    "a huge number where one is counted": text(calls=[{"node": "a", "step": 1}]).replace(
        b"1}", b"9" * 100_000 + b"}", 1
    ),
    "too deep": nested(5_000),
    "deeper than any stack": nested(1_000_000),
    "a million keys": text(metadata={str(i): [] for i in range(10)})[:-2],
}
ODD: dict[str, bytes] = {
    "a message of nothing": text(id="odd-shape-0", messages=[{"type": "human", "data": None}]),
    "calls that are no list": text(
        id="odd-shape-1", messages=[{"type": "ai", "data": {"content": "", "tool_calls": -1}}]
    ),
    "a call of an unknown tool": text(
        id="odd-shape-2", history=[{"type": "ai", "data": {"tool_calls": [{"name": None, "args": {}}]}}]
    ),
    "content that is none": text(id="odd-shape-3", messages=[{"type": "human", "data": {"content": None}}]),
    "a shadow that allows no list": text(id="odd-shape-4", decisions=[{"allowed": [], "shadow": {"allowed": True}}]),
    "a call without an id": text(
        id="odd-call", messages=[{"type": "ai", "data": {"content": "1", "tool_calls": [{"name": "a", "args": {}}]}}]
    ),
    "messages of others": text(id="odd-messages", messages=[{"role": "user"}]),
    "half an emoji": text(
        id="odd-\ud83d", answer="\ud83d", question={"id": "\udc00", "text": "What is \ud83d?", "answer": "\ud83d"}
    ),
    "bare NaN": text(id="odd-nan", seconds=float("nan"), metadata={"n": float("inf")}),
    "a huge integer": text(id="odd-int", metadata={"n": "@"}).replace(b'"@"', b"9" * 300_000),
    "nested": nested(150).replace(b"free-0", b"odd-deep"),
    "a date that is none": text(id="odd-date", started_at=1e18, seconds=-1e300),
    "control characters": text(id="odd-\x1b]0;x\x07", answer="\x00\x1b[2J\u202e", error="[bold]</script><b>"),
    "a verifier of their own": text(
        id="odd-verifier", question={"id": "v", "text": "?", "answer": "1", "verifier": "mine"}
    ),
    "a judge where none is named": text(
        id="odd-judge", question={"id": "v", "text": "?", "answer": "1", "verifier": "judge"}
    ),
    "a tool that the agent does not have": text(
        id="odd-tool", outcomes=[{"call_id": "1", "tool": "rm -rf", "arguments": {}, "status": "ok"}]
    ),
    "an image that is gone": text(
        id="odd-image", metadata={"images": ["data:image/png;base64,image:sha256:" + "0" * 64] * 1000}
    ),
    "a long text": text(id="odd-long", answer="x" * 3_000_000),
    "separators of lines": text(id="odd-lines", answer="\u2028\u2029\x85\r\n\x0b\x0c"),
    "fields of a later version": text(id="odd-later", tomorrow={"a": 1}),
    "costs that are none": text(
        id="odd-cost", outcomes=[{"call_id": "1", "tool": "", "arguments": {}, "status": "ok", "cost": float("nan")}]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    good = [dumps(run(i, branch)).encode() for i in range(100) for branch in ("direct", "tool")]
    lines = [*good[:100], *BAD.values(), *ODD.values(), *good[100:]]
    (folder / "segment-20260101T000000000000Z-1-aaaaaaaa.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def metis(*arguments: object) -> str:
    # Two gibibytes of memory are more than enough.
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)); "
    code = limited + "sys.argv[0] = 'metis'; from metis_agent.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=500
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    assert not any(mark in said for mark in ("\x1bc", "\x1b]", "\u202e", "\x00")), said
    return said


def test_it_is_read_in_bounded_memory(hostile: Path) -> None:
    store = TrajectoryStore(hostile, read_only=True)
    for whole in (True, False):
        tracemalloc.start()
        ids = {trajectory.id for trajectory in store.read(whole=whole)}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60_000_000
        assert store.report.corrupt == len(BAD)
        assert store.report.read == 200 + len(ODD)
        assert len([id_ for id_ in ids if id_.startswith("odd-")]) == len(ODD)
        assert all(len(bad.reason) < 1000 for bad in store.report.bad_lines)
    assert store.ids() == ids


def test_it_is_written_again(hostile: Path, tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path) as copy:
        for trajectory in TrajectoryStore(hostile, read_only=True).read():
            copy.append(trajectory)
    assert len(list(copy.read())) == 200 + len(ODD)
    assert copy.report.corrupt == 0


def test_it_is_reported(hostile: Path, tmp_path: Path) -> None:
    metis("report", "--store", hostile, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "</script><b>" not in page
    assert "\u202e" not in page


def test_it_is_curated(hostile: Path, tmp_path: Path) -> None:
    metis("curate", "sft", "--store", hostile, "--out", tmp_path / "sft")
    metis("curate", "rl", "--store", hostile, "--out", tmp_path / "rl")
    # Every good line went somewhere: none was lost on the way.
    lines = [line for path in (tmp_path / "sft").rglob("segment-*") for line in path.read_bytes().splitlines()]
    assert len(lines) == 200 + len(ODD)


def test_a_gate_is_trained_from_it(hostile: Path, tmp_path: Path) -> None:
    said = " ".join(metis("train", "gate", "--store", hostile, "--out", tmp_path / "gate").split())
    assert "2 by an unknown verifier" in said
    assert "2 another tool" in said
    assert f"{len(BAD)} lines of the store could not be read" in said
    assert (tmp_path / "gate" / "gate.json").exists()
