"""Curation for SFT: recorded trajectories in, those that teach strategic tool use out.

Two of its stages are here. `sound`: does the record agree with itself? What was altered, torn or invented after the run
falls out, and with `unique` a trajectory whose id was seen before. `answers`: was the run right? A wrong run teaches
the wrong thing, however well it used its tools.

Source: arXiv:2604.08545, the data of the cold start: run all code, drop what the base model solves without tools,
let a judge keep strategic tool use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from metis_agent.curation.pipeline import (
    KEEP,
    Chunking,
    CurationReport,
    Mark,
    Pipeline,
    Row,
    Stage,
    Verdict,
    drop,
    keep,
    undecided,
)
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.judging.judge import AnswerJudge
from metis_agent.judging.verifiers import UnknownVerifierError
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.recording import schema
from metis_agent.recording.shards import Storage, is_shard
from metis_agent.recording.store import TrajectoryStore, connected, spread
from metis_agent.types import ModelCall, Question, ToolOutcome, Trajectory

__all__ = ["MARK", "AnswersStage", "SoundStage", "UniqueStage", "curate_sft", "source_identity", "unmarked"]

MARK = "quarantine"
"""Key of `Trajectory.metadata` under which a row in quarantine says why it is there."""


def curate_sft(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    stages: Sequence[Stage[Trajectory]],
    *,
    settings: Mapping[str, Any] | None = None,
    chunking: Chunking = Chunking(),
    fresh: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    ray: str | None = None,
    there: Mapping[str, Callable[[], Stage[Trajectory]]] = MappingProxyType({}),
    progress: Callable[[CurationReport], None] = lambda _: None,
) -> CurationReport:
    """Stream a store's trajectories through stages; `OUT/kept` and both parts of `OUT/quarantine` are stores.

    Run it again after it was stopped, and it goes on; run it again after it was finished, and it reports.

    Args:
        source: a trajectory store; it is only read, and must not change until the run is finished.
        out: a folder or any fsspec URL.
        stages: in order, the cheap ones first.
        settings: what else the run depends on, as JSON.
        chunking: how much is done at a time.
        fresh: start again, over what an earlier run left.
        storage_options: keywords for the fsspec file systems.
        ray: address of a Ray cluster on which the stages of `there` rule, a few rows of a chunk at a time on each
            worker (see `recording.store.spread`).
        there: by name, makes on a worker a stage that is here too, and that rules on each row by itself.
        progress: called with the counts so far.

    Raises:
        ConfigurationError: source and out are the same, or out holds a run with other settings.
        InfrastructureError: a stage could decide nothing, such as with a judge that is down.
        StorageError: nothing can be read or written there.
    """
    if os.path.abspath(os.fspath(source)) == os.path.abspath(os.fspath(out)):
        raise ConfigurationError(f"source and out are both {os.fspath(source)!r}; name another folder for the outcome.")
    store = TrajectoryStore(source, read_only=True, storage_options=storage_options)
    spread_out = {} if ray is None else there
    stages = [_Spread(stage, spread_out[stage.name], ray) if stage.name in spread_out else stage for stage in stages]
    pipeline = Pipeline(
        out, stages, _Trajectories(), chunking=chunking, fresh=fresh, storage_options=storage_options,
        settings={"source": source_identity(source, storage_options), **(settings or {})},
    )  # fmt: skip
    with connected(ray):
        report = pipeline.run(map(unmarked, store.read()), progress=progress)
    report.unreadable = store.report.torn + store.report.corrupt
    pipeline.finish(report)
    return report


_PART = 32
"""Rows that a worker rules on at a time."""


class _Spread:
    """A stage whose rows are ruled on by the workers of a cluster."""

    def __init__(self, stage: Stage[Trajectory], make: Callable[[], Stage[Trajectory]], ray: str | None) -> None:
        self.name, self.settings = stage.name, stage.settings
        self._make, self._ray = make, ray

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        parts = [rows[at : at + _PART] for at in range(0, len(rows), _PART)]
        made = spread(partial(_ruled, make=self._make), parts, ray=self._ray)
        return [verdict for verdicts in made for verdict in verdicts]


def _ruled(rows: Sequence[Row[Trajectory]], *, make: Callable[[], Stage[Trajectory]]) -> Sequence[Verdict]:
    return make().rule(rows)


def source_identity(url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> str:
    """A hash of the shards' names and sizes: rows are counted from the start, so a source must not change."""
    place = Storage(url, storage_options)
    shards = [(name, place.size(name)) for name in sorted(filter(is_shard, place.names()))]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def unmarked(trajectory: Trajectory) -> Trajectory:
    """A trajectory without the mark of a quarantine, so that what was set aside can be curated again."""
    if MARK not in trajectory.metadata:
        return trajectory
    return replace(trajectory, metadata={key: it for key, it in trajectory.metadata.items() if key != MARK})


class _Trajectories:
    """The codec: stores of trajectories, those in quarantine with a mark in their metadata."""

    def line(self, value: Trajectory) -> str:
        return schema.dumps(value)

    def marked(self, value: Trajectory, mark: Mark) -> str:
        return schema.dumps(replace(value, metadata={**value.metadata, MARK: vars(mark)}))

    def folder(self, value: Trajectory) -> str:
        return "kept"


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
    try:
        wrong = _messages(trajectory)
    except (AttributeError, KeyError, TypeError):
        # A store may hold what somebody else wrote.
        wrong = drop("messages of another form than LangChain's")
    return wrong or _token_records(trajectory.calls) or KEEP


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
    waiting: dict[str | None, deque[Mapping[str, Any]]] = defaultdict(deque)
    for kind, body in messages:
        if kind == "ai":
            if body.get("invalid_tool_calls"):
                return drop("unreadable call", body["invalid_tool_calls"])
            for call in body.get("tool_calls") or ():
                waiting[call.get("id")].append(call)
        elif kind == "tool":
            wrong = _result(body, waiting[body.get("tool_call_id")], outcomes[body.get("tool_call_id", "")])
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


class AnswersStage:
    """Drops runs whose answer is wrong.

    Args:
        judge: rules on questions whose verifier is "judge".
        verify: rules on all others.
        unverified: what becomes of a run whose answer nobody can check.
    """

    name = "answers"

    def __init__(
        self,
        *,
        judge: AnswerJudge | None = None,
        verify: Callable[[Question, str], bool | None] = default_verify,
        unverified: Literal["keep", "drop"] = "keep",
    ) -> None:
        self._judge, self._verify, self._unverified = judge, verify, unverified
        self.settings: Mapping[str, Any] = {"unverified": unverified, "judge": judge.identity if judge else None}

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        verdicts = {row.number: self._verdict(row.value) for row in rows if not self._for_judge(row.value)}
        asked = [row for row in rows if self._for_judge(row.value)]
        if asked and self._judge is not None:
            judged = self._judge.judge([(row.value.question, row.value.answer) for row in asked])
            for row, ruling in zip(asked, judged, strict=True):
                if ruling.right is None and ruling.reason != "no reference":
                    verdicts[row.number] = undecided(ruling.reason)
                else:
                    verdicts[row.number] = self._of(ruling.right, ruling.reason)
        return [verdicts[row.number] for row in rows]

    def _for_judge(self, trajectory: Trajectory) -> bool:
        return self._judge is not None and trajectory.question.verifier == "judge"

    def _verdict(self, trajectory: Trajectory) -> Verdict:
        if trajectory.question.verifier == "judge":
            return self._of(None, "no judge is given")
        try:
            return self._of(self._verify(trajectory.question, trajectory.answer), "")
        except InfrastructureError as error:
            return undecided("judge unavailable", error)
        except UnknownVerifierError:
            return self._of(None, "unknown verifier")

    def _of(self, right: bool | None, reason: str) -> Verdict:
        if right is None:
            return keep("answer unverified") if self._unverified == "keep" else drop("answer unverified", reason)
        return KEEP if right else drop("wrong answer", reason)
