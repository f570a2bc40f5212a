"""Stage `sound`: does the record agree with itself? What was altered, torn or invented after the run falls out here.

It needs nothing but the record. `unique`, beside it, drops a trajectory whose id was seen before.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metis_agent.hdpo.curation.stage import KEEP, Row, Verdict, drop
from metis_agent.types import ModelCall, ToolOutcome, Trajectory

__all__ = ["SoundStage", "UniqueStage"]


class SoundStage:
    """Drops records that contradict themselves."""

    name = "sound"
    settings: Mapping[str, Any] = {}

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        return [_sound(row.value) for row in rows]


def _sound(trajectory: Trajectory) -> Verdict:
    if trajectory.status != "finished":
        return drop("failed run", trajectory.error)
    if not trajectory.answer.strip():
        return drop("no answer")
    if "<tool_call" in trajectory.answer:
        return drop("call leaked into the answer", trajectory.answer[:200])
    if not trajectory.messages:
        return drop("no messages")
    return _messages(trajectory) or _token_records(trajectory.calls) or KEEP


def _messages(trajectory: Trajectory) -> Verdict | None:
    """What is wrong with the messages; `None` where nothing is."""
    messages = [(message.get("type"), message.get("data", message)) for message in trajectory.messages]
    asked = next((_text(body) for kind, body in messages if kind == "human"), None)
    if asked != trajectory.question.text:
        return drop("question differs from the message", asked)
    kind, last = messages[-1]
    if kind not in ("ai", "tool") or last.get("tool_calls") or _text(last) != trajectory.answer:
        return drop("answer differs from the message", _text(last)[:200])
    outcomes: dict[str, deque[ToolOutcome]] = defaultdict(deque)
    for outcome in trajectory.outcomes:
        outcomes[outcome.call_id].append(outcome)
    waiting: dict[str, deque[Mapping[str, Any]]] = defaultdict(deque)
    for kind, body in messages:
        if kind == "ai":
            if body.get("invalid_tool_calls"):
                return drop("unreadable call", body["invalid_tool_calls"])
            for call in body.get("tool_calls") or ():
                waiting[call["id"]].append(call)
        elif kind == "tool":
            wrong = _result(body, waiting[body.get("tool_call_id")], outcomes[body.get("tool_call_id")])
            if wrong:
                return wrong
    if any(waiting.values()):
        return drop("call without a result", next(calls[0]["name"] for calls in waiting.values() if calls))
    if any(outcomes.values()):
        return drop("outcome without a call", next(left[0].tool for left in outcomes.values() if left))
    return None


def _result(body: Mapping[str, Any], calls: deque[Mapping[str, Any]], outcomes: deque[ToolOutcome]) -> Verdict | None:
    """What is wrong with one tool message, given the calls and outcomes of its id, which it uses up."""
    if not calls:
        return drop("result without a call", _text(body)[:200])
    call = calls.popleft()
    if not outcomes:
        return drop("result without an outcome", call["name"])
    outcome = outcomes.popleft()
    if call["name"] != outcome.tool:
        return drop("tool differs from the call", f"{call['name']!r} was called, {outcome.tool!r} is recorded")
    if call.get("args") != outcome.arguments:
        return drop("arguments differ from the call", f"{call.get('args')!r} against {dict(outcome.arguments)!r}")
    if _text(body) != outcome.content:
        return drop("result differs from the message", f"{_text(body)[:200]!r} against {outcome.content[:200]!r}")
    return None


def _token_records(calls: Sequence[ModelCall]) -> Verdict | None:
    for call in calls:
        written, log_probs = call.completion_ids, call.log_probs
        if (call.prompt_ids is None) != (written is None):
            return drop("broken token record", f"step {call.step}: only one of prompt and completion")
        if written is not None and (not written or min(written) < 0 or min(call.prompt_ids or (0,)) < 0):
            return drop("broken token record", f"step {call.step}: no completion, or a negative id")
        if log_probs is not None and (
            len(log_probs) != len(written or ()) or not all(math.isfinite(p) and p <= 1e-3 for p in log_probs)
        ):
            return drop("broken token record", f"step {call.step}: log-probabilities don't fit the completion")
    return None


def _text(body: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be blocks."""
    content = body.get("content", "")
    if isinstance(content, str):
        return content
    texts = (block if isinstance(block, str) else block.get("text", "") for block in content)
    return "".join(text for text in texts if isinstance(text, str))


class UniqueStage:
    """Drops a trajectory whose id stood earlier in the source; what was seen is kept in a local file.

    Args:
        index: the file; `None` for memory.
    """

    name = "unique"
    settings: Mapping[str, Any] = {}

    def __init__(self, index: Path | None = None) -> None:
        if index is not None:
            index.parent.mkdir(parents=True, exist_ok=True)
        self._seen = sqlite3.connect(index or ":memory:", isolation_level=None, check_same_thread=False)
        self._seen.execute("PRAGMA journal_mode = WAL")
        self._seen.execute("PRAGMA synchronous = OFF")
        self._seen.execute("CREATE TABLE IF NOT EXISTS seen (id INTEGER PRIMARY KEY, number INTEGER NOT NULL)")

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`; the first number that had an id keeps it, so asking again changes nothing."""
        keys = [_key(row.value.id) for row in rows]
        self._seen.execute("BEGIN")
        self._seen.executemany(
            "INSERT INTO seen VALUES (?, ?) ON CONFLICT DO UPDATE SET number = min(number, excluded.number)",
            [(key, row.number) for key, row in zip(keys, rows, strict=True)],
        )
        self._seen.execute("COMMIT")
        first = [self._seen.execute("SELECT number FROM seen WHERE id = ?", (key,)).fetchone()[0] for key in keys]
        return [
            KEEP if number == row.number else drop("duplicate id", f"{row.value.id!r} is row {number} already")
            for row, number in zip(rows, first, strict=True)
        ]


def _key(id_: str) -> int:
    return int.from_bytes(hashlib.blake2b(id_.encode("utf-8", "replace"), digest_size=8).digest(), "big", signed=True)
