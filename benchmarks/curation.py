"""Time and memory of curation by the size of the store, with planted faults that all must be caught; prints JSON.

A store of N trajectories, sixteen a question, is written with faults of known kinds at known places. Then `curate_sft`
runs all of its stages over it: replay calls the real sandbox and the real corpus search; the base model and the
judge answer at once, in this process, so that what is measured is curation and not somebody's model. `curate_rl`
runs over the same store. Each in a process of its own, for its peak memory. `faults` compares, for each kind, what was
planted with what was found in quarantine under the reason that it should have.

Sandboxed programs are drawn from a hundred, since equal ones are run once; what one program costs is
`sandbox_seconds_per_program`: of a store whose programs all differ, that is what most of the time would be.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda

from metis_agent.curation.leaks import LeaksStage
from metis_agent.curation.pipeline import Chunking, CurationReport
from metis_agent.curation.replay import ReplayStage
from metis_agent.curation.rl import CorruptedStage, DuplicatesStage, MixStage, curate_rl
from metis_agent.curation.sft import MARK, AnswersStage, SoundStage, UniqueStage, curate_sft
from metis_agent.curation.strategy import DirectEvidence, DirectStage, StrategyStage
from metis_agent.recording.store import TrajectoryStore
from metis_agent.sqlite import DiskCache
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.types import ModelCall, Question, ToolOutcome, Trajectory

GROUP, PROGRAMS, DOCUMENTS, TESTS = 16, 100, 2_000, 200
FAULT_EVERY = 7


# --- the store -------------------------------------------------------------------------------------------------


def question(number: int) -> Question:
    """Even ones are computed, odd ones are looked up; every fourth is known to the base model."""
    if number % 2 == 0:
        a, b = 1_000 + number // 2 % PROGRAMS, 7_001
        text = f"Stall {number} sells {a} crates of {b} figs each; how many figs does it sell in all?"
        return Question(
            id=f"q{number}", text=text, answer=str(a * b), verifier="numeric", metadata={"code": f"{a}*{b}"}
        )
    town = number // 2 % DOCUMENTS
    text = f"In the year {number} of the almanac, which river runs through the town of Place{town}?"
    return Question(id=f"q{number}", text=text, answer=f"River{town * 31 % 997}", metadata={"town": town})


def trajectory(number: int, content_of: Callable[[Question], str]) -> Trajectory:
    """A run that calls the right tool once and answers rightly, but for one rollout of four."""
    asked = question(number // GROUP)
    tool = "python" if "code" in asked.metadata else "text_search"
    key = "code" if tool == "python" else "query"
    arguments = {key: asked.metadata["code"] if tool == "python" else f"Place{asked.metadata['town']}"}
    content = content_of(asked)
    answer = str(asked.answer) if number % 4 else "I can't say."
    call = {"name": tool, "args": arguments, "id": f"c{number}", "type": "tool_call"}
    ids = tuple(range(40, 100))
    return Trajectory(
        id=f"run/{number}",
        question=asked,
        answer=answer,
        messages=(
            {"type": "human", "data": {"content": asked.text}},
            {"type": "ai", "data": {"content": "", "tool_calls": [call]}},
            {"type": "tool", "data": {"content": content, "tool_call_id": f"c{number}", "status": "success"}},
            {"type": "ai", "data": {"content": answer, "tool_calls": []}},
        ),
        calls=(
            ModelCall(node="act", step=0, tool_calls=(call,), prompt_ids=ids[:40], completion_ids=ids[40:]),
            ModelCall(node="act", step=1, text=answer, prompt_ids=ids, completion_ids=ids[:8], continues=True),
        ),
        outcomes=(ToolOutcome(call_id=f"c{number}", tool=tool, arguments=arguments, status="ok", content=content),),
    )


def _tool_says(run: Trajectory, content: str) -> Trajectory:
    messages = [dict(message) for message in run.messages]
    messages[2] = {"type": "tool", "data": {**messages[2]["data"], "content": content}}
    return replace(run, messages=tuple(messages), outcomes=(replace(run.outcomes[0], content=content),))


FAULTS: dict[str, tuple[str, Callable[[Trajectory], Trajectory]]] = {
    # kind: where and why it must be found, how it is planted
    "failed run": ("sound: failed run", lambda run: replace(run, status="failed", error="InfrastructureError: gone")),
    "empty answer": ("sound: no answer", lambda run: replace(run, answer=" ")),
    "altered answer": ("sound: answer differs from the message", lambda run: replace(run, answer=run.answer + "!")),
    "altered question": (
        "sound: question differs from the message",
        lambda run: replace(run, question=replace(run.question, text=run.question.text + "?")),
    ),
    "altered message": (
        "sound: result differs from the message",
        lambda run: replace(run, outcomes=(replace(run.outcomes[0], content="42"),)),
    ),
    "altered arguments": (
        "sound: arguments differ from the call",
        lambda run: replace(run, outcomes=(replace(run.outcomes[0], arguments={"code": "6*7"}),)),
    ),
    "lost outcome": ("sound: result without an outcome", lambda run: replace(run, outcomes=())),
    "torn token record": (
        "sound: broken token record",
        lambda run: replace(run, calls=(replace(run.calls[0], log_probs=(-0.1,)), *run.calls[1:])),
    ),
    "same id": ("unique: duplicate id", lambda run: replace(run, id="run/1")),
    "wrong result": ("replay: result does not match the record", lambda run: _tool_says(run, "0")),
    "failed call": (
        "replay: recorded call failed",
        lambda run: replace(run, outcomes=(replace(run.outcomes[0], status="error"),)),
    ),
    "blocked call": (
        "replay: recorded call was not run",
        lambda run: replace(run, outcomes=(replace(run.outcomes[0], status="blocked"),)),
    ),
}  # fmt: skip


def planted(number: int) -> str:
    """The fault of a row; "" for none. Only in runs that would pass, so that each is found where it is planted."""
    if number < 2 or number % FAULT_EVERY or not number % 4:
        return ""
    rank = number // FAULT_EVERY
    return list(FAULTS)[(rank - rank // 4) % len(FAULTS)]  # every fourth is left out above


def known(asked: Question) -> bool:
    """Whether the base model knows it."""
    return int(asked.id[1:]) % 4 == 3


def frivolous(asked: Question) -> bool:
    """Whether the judge finds the call unjustified."""
    return int(asked.id[1:]) % 10 == 6


def write_store(folder: Path, rows: int) -> None:
    tools = {tool.name: tool for tool in open_tools()}
    contents: dict[str, str] = {}

    def content_of(asked: Question) -> str:
        tool, argument = ("python", asked.metadata.get("code")) if "code" in asked.metadata else ("text_search", None)
        argument = argument or f"Place{asked.metadata['town']}"
        if argument not in contents:
            contents[argument] = str(tools[tool].invoke({"code" if tool == "python" else "query": argument}))
        return contents[argument]

    with TrajectoryStore(folder) as store:
        for number in range(rows):
            run = trajectory(number, content_of)
            if fault := planted(number):
                run = FAULTS[fault][1](run)
            store.append(run)


def open_tools() -> list[Any]:
    documents = [
        Document(id=str(town), title=f"Place{town}", text=f"Place{town} lies on River{town * 31 % 997}.")
        for town in range(DOCUMENTS)
    ]
    return [
        PythonTool(max_sessions=8, idle_seconds=60.0),
        TextSearchTool(backend=CorpusSearch.build(documents), limit=1),
    ]


# --- what is measured ----------------------------------------------------------------------------------------------


class Probe:
    """A base model that answers at once."""

    identity = "benchmark"

    def ask(self, questions: Sequence[Question]) -> list[DirectEvidence]:
        """Known or not, as `known` says."""
        return [DirectEvidence(right=8 if known(it) else 0, wrong=0 if known(it) else 8) for it in questions]


class InstantJudge(BaseChatModel):
    """A judge that reads the question off its data and rules at once."""

    @property
    def _llm_type(self) -> str:
        return "instant"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage("yes"))])

    def with_structured_output(self, schema: Any, **_: Any) -> Any:
        """Verdicts by the number in the question."""

        def rule(messages: list[BaseMessage]) -> Any:
            self.invoke(messages)  # what LangChain itself costs
            asked = json.loads(str(messages[1].content).split("\n", 1)[1].rsplit("</data-", 1)[0])["question"]
            ours = asked.startswith(("Stall", "In the year"))
            number = int(asked.split()[1 if asked.startswith("Stall") else 3]) if ours else 0
            justified = ours and not frivolous(question(number))
            return schema(reason="by its number", relevant=ours, coherent=ours, justified=justified)

        return RunnableLambda(rule)


def curate(kind: str, store: Path, out: Path) -> dict[str, Any]:
    """One run, in this process."""
    work = out / "work"
    started, cpu = time.perf_counter(), time.process_time()
    if kind == "sft":
        cache = DiskCache(work / "cache.sqlite")
        replay = ReplayStage(open_tools(), cache=cache)
        test = (replace(question(10**9 + number), id=f"t{number}") for number in range(TESTS))
        report = curate_sft(
            store, out,
            [
                SoundStage(), UniqueStage(work / "ids.sqlite"), AnswersStage(),
                LeaksStage(test, question_of=lambda run: run.question, folder=work / "test"), replay,
                DirectStage(Probe(), cache=cache), StrategyStage(InstantJudge(), cache=cache, name="instant"),
            ],
            chunking=Chunking(rows=1_000),
        )  # fmt: skip
        extra = {"executed_calls": replay.executed, **_found(out)}
    else:
        report = curate_rl(
            store, out, [CorruptedStage(), MixStage(), DuplicatesStage(work / "duplicates.sqlite")], work=work
        )
        extra = {}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "rows": report.rows,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_mb": usage.ru_maxrss / 1024,
        "kept": report.kept.total(),
        "dropped": report.dropped,
        "undecided": report.undecided,
        "none_lost": report.rows == report.kept.total() + report.dropped + report.undecided == _lines(out),
        "stages": _why(report),
        **extra,
    }


def _why(report: CurationReport) -> dict[str, Any]:
    return {stage.name: {"in": stage.rows_in, "out": stage.rows_out, **stage.dropped} for stage in report.stages}


def _segments(out: Path) -> Iterator[Path]:
    for folder in ("kept", "quarantine/dropped", "quarantine/undecided"):
        yield from (out / folder).glob("segment-*.jsonl")


def _lines(out: Path) -> int:
    """Rows that were really written."""
    return sum(path.read_bytes().count(b"\n") for path in _segments(out))


def _found(out: Path) -> dict[str, Any]:
    """For each kind of fault: how many were planted, and how many are in quarantine for the reason they should."""
    wanted, found = Counter[str](), Counter[str]()
    places = {"kept": "kept", "dropped": "quarantine/dropped"}
    for place, folder in places.items():
        if not (out / folder).exists():
            continue
        for run in TrajectoryStore(out / folder, read_only=True).read(whole=False):
            number = int(run.id.split("/")[1])
            mark = run.metadata.get(MARK)
            if mark is not None and (mark["stage"], mark["reason"]) == ("unique", "duplicate id"):
                wanted["same id"] += 1
                found["same id"] += 1
                continue
            fault = planted(number)
            if not fault:
                fault = (
                    "" if not number % 4 else "known" if known(run.question) else
                    "unjustified" if frivolous(run.question) else ""
                )  # fmt: skip
            if not fault:
                continue
            reasons = {"known": "direct: known without tools", "unjustified": "strategy: not justified"}
            reason = reasons.get(fault) or FAULTS[fault][0]
            wanted[fault] += 1
            found[fault] += place == "dropped" and f"{mark['stage']}: {mark['reason']}" == reason
    return {"faults": {fault: [wanted[fault], found[fault]] for fault in sorted(wanted)}}


def sandbox_seconds(programs: int = 20) -> float:
    tool = PythonTool(max_sessions=2, idle_seconds=1.0)
    tool.check()
    started = time.perf_counter()
    for number in range(programs):
        tool.invoke({"code": f"{number} * 7"})
    return (time.perf_counter() - started) / programs


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """One size: write the store, curate it twice, remove everything."""
    place = folder / str(rows)
    try:
        for step in (["write"], ["sft"], ["rl"]):
            command = [sys.executable, __file__, "--folder", str(place), "--step", *step, "--rows", str(rows)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if step == ["write"]:
                size = sum(path.stat().st_size for path in (place / "store").glob("*.jsonl"))
                result: dict[str, Any] = {"rows": rows, "store_mb": size / 2**20}
            else:
                result[step[0]] = json.loads(finished.stdout)
                shutil.rmtree(place / step[0], ignore_errors=True)
        return result
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where stores are written and removed; by default a temporary one")
    parser.add_argument("--step", choices=("write", "sft", "rl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    random.seed(0)
    if arguments.step == "write":
        write_store(arguments.folder / "store", arguments.rows[0])
    elif arguments.step:
        print(json.dumps(curate(arguments.step, arguments.folder / "store", arguments.folder / arguments.step)))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            sizes = [measure(rows, Path(folder)) for rows in arguments.rows]
        print(json.dumps({"sizes": sizes, "sandbox_seconds_per_program": sandbox_seconds()}, indent=2))


if __name__ == "__main__":
    main()
