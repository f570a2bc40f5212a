"""Stores that the report's tests read: one worked out by hand, and one that means harm."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from metis_agent.recording.store import TrajectoryStore
from metis_agent.report.figures import RunTable
from metis_agent.types import Branch, GateDecision, Question, ToolOutcome, Trajectory

QUESTIONS = {
    "q1": Question(id="q1", text="What is 2 + 2?", answer="4", kind="sum"),
    "q2": Question(id="q2", text="What is 3 + 3?", answer="6", kind="sum"),
    "q3": Question(id="q3", text="Who founded Dadote?", answer="Ada", kind="fact"),
    "q4": Question(id="q4", text="When was Dadote founded?", answer="1843", kind="fact"),
    "q5": Question(id="q5", text="Shall we dance?", kind="chat"),
}


def table_of(runs: tuple[Trajectory, ...]) -> RunTable:
    table = RunTable()
    for each in runs:
        table.add(each)
    return table


def outcome(tool: str, number: int = 0, *, status: Any = "ok", content: str = "found") -> ToolOutcome:
    return ToolOutcome(
        call_id=f"c{number}", tool=tool, arguments={"code": "print(1)\nprint(2)"}, status=status, content=content,
        seconds=0.5, cost=0.01,
    )  # fmt: skip


def run(question: str | Question, answer: str, *tools: str, branch: Branch = "free", number: int = 0) -> Trajectory:
    asked = QUESTIONS[question] if isinstance(question, str) else question
    outcomes = tuple(outcome(tool, place) for place, tool in enumerate(tools))
    messages: list[dict[str, Any]] = [{"type": "human", "data": {"content": asked.text}}]
    for each in outcomes:
        call = {"name": each.tool, "args": dict(each.arguments), "id": each.call_id}
        messages.append({"type": "ai", "data": {"content": "", "tool_calls": [call]}})
        messages.append({"type": "tool", "data": {"content": each.content, "tool_call_id": each.call_id}})
    messages.append({"type": "ai", "data": {"content": answer}})
    return Trajectory(
        id=f"{branch}/{asked.id}/{number}", question=asked, branch=branch, answer=answer, outcomes=outcomes,
        messages=tuple(messages), decisions=(GateDecision(allowed=tuple(tools), gate="test"),),
        seconds=1.0 + len(tools), started_at=1000.0 + number,
    )  # fmt: skip


# q1 and q2 are known (direct right both times), q3 is necessary (direct wrong, tool right), q4 neither (one of two).
PROBES = (
    run("q1", "4", branch="direct"), run("q1", "4", branch="direct", number=1), run("q1", "4", "python", branch="tool"),
    run("q2", "6", branch="direct"), run("q2", "6", branch="direct", number=1), run("q2", "6", "python", branch="tool"),
    run("q3", "Bob", branch="direct"), run("q3", "Eve", branch="direct", number=1),
    run("q3", "Ada", "text_search", branch="tool"),
    run("q4", "1843", branch="direct"), run("q4", "1900", branch="direct", number=1),
    run("q4", "1843", "text_search", branch="tool"),
    # This one was to call a tool and did not: it says nothing of that branch.
    run("q4", "1900", branch="tool", number=1),
)  # fmt: skip

# Every question calls once, and python spoils q2.
BEFORE = (
    run("q1", "4", "python"), run("q2", "7", "python"), run("q3", "Ada", "text_search"),
    run("q4", "1843", "text_search"), run("q5", "Yes.", "text_search"), *PROBES,
)  # fmt: skip

# q1 direct and right; q2 redundant; q3 missed; q4 two calls; q5 direct, and nobody knows the answer.
AFTER = (
    run("q1", "4"), run("q2", "6", "python"), run("q3", "Bob"), run("q4", "1843", "text_search", "python"),
    run("q5", "No."), replace(run("q1", "", number=9), status="failed", error="the server went away"), *PROBES,
)  # fmt: skip


def store(folder: Path, runs: tuple[Trajectory, ...]) -> str:
    with TrajectoryStore(folder) as kept:
        for each in runs:
            kept.append(each)
    return str(folder)


def png(width: int = 2, height: int = 2) -> bytes:
    """A small picture, without Pillow."""
    rows = b"".join(b"\0" + b"\x20\x60\xa0" * width for _ in range(height))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def image_block(content: bytes) -> dict[str, str]:
    return {"type": "image", "base64": base64.b64encode(content).decode(), "mime_type": "image/png"}


HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "' onmouseover='window.hacked=1",
    "<a href=javascript:window.hacked=1>javascript:window.hacked=1</a>",
    "<!--<script>",
    "{{script}}{{archive}}",
    "&lt;b&gt;",
    "\x1b[31mred\x1b[0m\x00",
    "\u202egnirts desrever\u2066",
    "half \ud83d of it",
    "A" * 300_000,
)


def hostile_runs() -> tuple[Trajectory, ...]:
    """Every text of every run means harm."""
    found = []
    for number, text in enumerate(HOSTILE):
        asked = Question(
            id=text[:500] + str(number), text=text, answer=text, kind=text[:500], metadata={text[:500]: text}
        )
        each = outcome(text[:500], content=text)
        each = replace(each, arguments={text[:500]: text, "code": text + "\n" + text, "other": [text, {"a": 1}]})
        call = {"name": each.tool, "args": dict(each.arguments), "id": each.call_id}
        svg = {"type": "image", "base64": base64.b64encode(b"<svg onload='window.hacked=1'/>").decode()}
        remote = {"type": "image_url", "image_url": {"url": "https://example.invalid/x.png?" + text[:500]}}
        blocks = [{"type": "text", "text": text}, image_block(png()), svg, remote, text, {"type": text[:500]}]
        found.append(
            Trajectory(
                id=text[:500],
                question=asked,
                answer=text,
                outcomes=(each,),
                messages=(
                    {"type": "human", "data": {"content": blocks}},
                    {
                        "type": "ai",
                        "data": {
                            "content": text,
                            "tool_calls": [call],
                            "invalid_tool_calls": [{"name": text[:500], "args": text, "id": "x", "error": text}],
                        },
                    },
                    {"type": "tool", "data": {"content": text, "tool_call_id": "c0", "name": text[:500]}},
                    {"type": text[:500], "data": {"content": 5}},
                    {"type": "ai", "data": 7},
                ),
                decisions=(
                    GateDecision(
                        allowed=(text[:500],),
                        probabilities={text[:500]: 0.5},
                        threshold=0.5,
                        gate=text[:500],
                        reason=text,
                        shadow={"reason": text, "allowed": [text[:500]]},
                    ),
                ),
                metadata={text[:500]: text, "deep": {"er": [text]}},
                seconds=float("nan"),
            )
        )
    return tuple(found)
