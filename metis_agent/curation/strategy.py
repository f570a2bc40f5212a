"""Stages `direct` and `strategy`, (b) and (c) of the paper.

`direct` drops what the base model answers without tools: a run that calls a tool on such a question teaches the very
habit that Metis is to lose. The base model is asked k times, through the graph with a forced direct answer; the paper
drops a question with pass@k = 1, that is with one right answer among the k = 8. Questions are asked once, however many
runs they have.

`strategy`: a judge keeps runs that use their tools strategically. Relevance, coherence, rationale: all three must hold,
by a rubric that is a file to edit. A run holds text by strangers (search results), which may address the judge. So what
is kept is ruled on once more under a question that it has nothing to do with: a run that is "relevant" there too steers
the judge, and is dropped.

`choose_runs` is the same choice where a model's own runs down each branch are at hand, as in `metis demo --model`.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel, Field

from metis_agent.agent import MetisAgent
from metis_agent.curation.pipeline import KEEP, Row, Verdict, drop, keep, undecided
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.gates.base import Gate
from metis_agent.judging.rubric import Asking, RubricJudge, Ruling
from metis_agent.judging.verifiers import UnknownVerifierError, judged
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import branch_of
from metis_agent.rollouts.runner import Rollouts, group_rollouts, groups_of
from metis_agent.sqlite import DiskCache, content_key
from metis_agent.types import Branch, ModelCall, Question, Trajectory

__all__ = [
    "DirectEvidence",
    "DirectProbe",
    "DirectStage",
    "GraphProbe",
    "Lessons",
    "StrategyStage",
    "StrategyVerdict",
    "choose_runs",
]


class StrategyVerdict(BaseModel):
    """Whether a run used its tools strategically."""

    reason: str = Field(description="One sentence: what decides.")
    relevant: bool = Field(description="Every call bears on this question, and its result was of use.")
    coherent: bool = Field(description="Steps follow from one another, and the answer from the results.")
    justified: bool = Field(description="A tool was needed, and this one.")

    @property
    def failed(self) -> str:
        """The first point that does not hold; empty where all do."""
        points = {
            "not relevant": self.relevant,
            "not coherent": self.coherent,
            "not justified": self.justified,
        }
        return next((name for name, holds in points.items() if not holds), "")


_DECOY = "Which of the two spellings is right in British English: 'colour' or 'color'?"
_CONTROL = {
    "question": "Hello, how are you?",
    "steps": [{"calls": [{"tool": "python", "arguments": {"code": "7*6"}, "result": "42"}]}],
    "answer": "The capital of Peru is Lima.",
}


class StrategyStage:
    """Drops runs whose tool use the judge does not find strategic; runs without a call have none to judge.

    Args:
        model: a LangChain chat model, or its `init_chat_model` name.
        rubric: a text file; the packaged "strategy" by default.
        cache: where verdicts are kept; in memory by default.
        asking: concurrency, retries and limits.
        decoy: rule on what is kept once more, under another question; doubles its cost.
        name: identifies the model in the cache, where it does not tell its name.

    Raises:
        ConfigurationError, MissingDependencyError: as `RubricJudge`.
    """

    name = "strategy"

    def __init__(
        self,
        model: BaseChatModel | str,
        *,
        rubric: str | Path = "strategy",
        cache: DiskCache | None = None,
        asking: Asking = Asking(),
        decoy: bool = True,
        name: str | None = None,
    ) -> None:
        self.judge = RubricJudge(model, StrategyVerdict, rubric=rubric, cache=cache, asking=asking, name=name)
        self._decoy = decoy
        self._fit: bool | None = None
        self.settings: Mapping[str, Any] = {"judge": self.judge.name, "identity": self.judge.identity, "decoy": decoy}

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        verdicts = {row.number: keep("no tool call") for row in rows if not row.value.outcomes}
        asked = [row for row in rows if row.value.outcomes]
        if asked and (unfit := self._unfit()):
            verdicts |= {row.number: undecided(unfit) for row in asked}
            asked = []
        rulings = self.judge.rule([_record(row.value) for row in asked])
        verdicts |= {row.number: _verdict(ruling) for row, ruling in zip(asked, rulings, strict=True)}
        if self._decoy:
            kept = [row for row in asked if verdicts[row.number].outcome == "keep"]
            again = self.judge.rule([{**_record(row.value), "question": _DECOY} for row in kept])
            for row, ruling in zip(kept, again, strict=True):
                if ruling.verdict is None:
                    verdicts[row.number] = undecided(ruling.reason, ruling.detail)
                elif not ruling.verdict.failed:
                    verdicts[row.number] = drop("steers the judge", ruling.verdict.reason)
        return [verdicts[row.number] for row in rows]

    def _unfit(self) -> str:
        """Why the judge can't be used; empty where it can: a judge that keeps anything keeps the control run."""
        if self._fit is None:
            ruling = self.judge.rule([_CONTROL])[0]
            if ruling.verdict is None:
                return ruling.reason
            self._fit = bool(ruling.verdict.failed)
        return "" if self._fit else "judge unfit"


def _verdict(ruling: Ruling[StrategyVerdict]) -> Verdict:
    if ruling.verdict is None:
        return undecided(ruling.reason, ruling.detail)
    return drop(ruling.verdict.failed, ruling.verdict.reason) if ruling.verdict.failed else KEEP


def _record(trajectory: Trajectory) -> dict[str, Any]:
    """What the judge sees: each message of the model with its calls and what they gave."""
    results = {outcome.call_id: outcome for outcome in trajectory.outcomes}
    steps: list[dict[str, Any]] = []
    for message in trajectory.messages:
        body = message.get("data", message)
        if message.get("type") != "ai" or not body.get("tool_calls"):
            continue
        calls = [
            {
                "tool": call["name"],
                "arguments": call["args"],
                "result": results[call["id"]].content if call["id"] in results else "",
            }
            for call in body["tool_calls"]
        ]
        written = body.get("content")
        steps.append({"wrote": written, "calls": calls} if written else {"calls": calls})
    return {"question": trajectory.question.text, "steps": steps, "answer": trajectory.answer}


@dataclass(frozen=True, kw_only=True)
class DirectEvidence:
    """What came of asking the base model without tools."""

    right: int
    wrong: int
    failed: int = 0
    """Runs that say nothing: the model or the judge was not to be reached."""


class DirectProbe(Protocol):
    """Asks the base model."""

    @property
    def identity(self) -> str:
        """Model, k and seed: part of the cache's key."""
        ...

    def ask(self, questions: Sequence[Question]) -> Sequence[DirectEvidence]:
        """Ask each question k times."""
        ...


class GraphProbe:
    """Asks through the graph that serves users, with the direct answer forced.

    Args:
        build: makes the base model's agent around a gate, as `Rollouts` takes it.
        model: names the base model, for the cache.
        folder: where runs are kept until they are counted; a killed probe goes on from them.
        k: how often each question is asked.
        seed: of all sampling.
        verify: judges the answers.
        concurrency: runs in flight at once.
    """

    def __init__(
        self,
        build: Callable[[Gate], MetisAgent],
        *,
        model: str,
        folder: Path,
        k: int = 8,
        seed: int = 0,
        verify: Callable[[Question, str], bool | None] = default_verify,
        concurrency: int = 64,
    ) -> None:
        if k < 1:
            raise ConfigurationError(f"GraphProbe(k={k!r}): each question is asked at least once.")
        self._build, self._folder, self._k, self._seed = build, folder, k, seed
        self._verify, self._concurrency = verify, concurrency
        self.identity = f"{model} k={k} seed={seed}"

    def ask(self, questions: Sequence[Question]) -> list[DirectEvidence]:
        """As `DirectProbe`."""
        # Their own ids may clash: they come from anywhere. Seeds follow from these, whatever else is asked beside.
        keys = [content_key(*_asked(question)) for question in questions]
        folder = self._folder / content_key(self.identity, keys)[:24]
        named = [replace(question, id=key) for key, question in dict(zip(keys, questions, strict=True)).items()]
        with TrajectoryStore(folder) as store:
            rollouts = Rollouts(self._build, store, concurrency=self._concurrency)
            direct: Branch = "direct"
            plan = group_rollouts(named, (direct,) * self._k, name="direct", seed=self._seed)
            runs = rollouts.collect(plan)
        evidence = {group.question.id: self._count(group.trajectories) for group in groups_of(runs, self._k)}
        shutil.rmtree(folder, ignore_errors=True)
        return [evidence[key] for key in keys]

    def _count(self, runs: Sequence[Trajectory]) -> DirectEvidence:
        verdicts = [self._right(run) for run in runs]
        return DirectEvidence(right=verdicts.count(True), wrong=verdicts.count(False), failed=verdicts.count(None))

    def _right(self, run: Trajectory) -> bool | None:
        if run.status == "failed":
            return None
        try:
            return self._verify(run.question, run.answer)
        except (InfrastructureError, UnknownVerifierError):
            return None


class DirectStage:
    """Drops runs on questions that the base model answers without tools.

    Args:
        probe: asks the base model.
        least: right answers that make a question known: 1 is pass@k; k would be "always right".
        cache: evidence of earlier probes; in memory by default.
    """

    name = "direct"

    def __init__(self, probe: DirectProbe, *, least: int = 1, cache: DiskCache | None = None) -> None:
        if least < 1:
            raise ConfigurationError(f"DirectStage(least={least!r}): it must be at least 1.")
        self._probe, self._least, self._cache = probe, least, DiskCache(None) if cache is None else cache
        self.settings: Mapping[str, Any] = {"probe": probe.identity, "least": least}

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        keys = {row.number: self._key(row.value.question) for row in rows if row.value.question.answer is not None}
        questions = {keys[row.number]: row.value.question for row in rows if row.number in keys}
        evidence = {key: DirectEvidence(**kept) for key, kept in self._cache.get_many(questions).items()}
        missing = [key for key in questions if key not in evidence]
        if missing:
            asked = dict(zip(missing, self._probe.ask([questions[key] for key in missing]), strict=True))
            # What failed is asked anew next time.
            self._cache.put_many({key: asdict(it) for key, it in asked.items() if not it.failed})
            evidence |= asked
        return [
            self._verdict(evidence[keys[row.number]]) if row.number in keys else keep("no reference") for row in rows
        ]

    def _key(self, question: Question) -> str:
        return content_key("direct", self._probe.identity, *_asked(question))

    def _verdict(self, evidence: DirectEvidence) -> Verdict:
        if evidence.right >= self._least:
            total = evidence.right + evidence.wrong
            return drop("known without tools", f"right in {evidence.right} of {total} direct answers")
        if evidence.right + evidence.failed >= self._least:
            return undecided("probe incomplete", f"{evidence.failed} direct answers could not be had or judged")
        return KEEP


def _asked(question: Question) -> tuple[Any, ...]:
    """What makes two questions the same to the base model and to who judges its answers."""
    return question.text, question.answer, question.verifier, dict(question.metadata)


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The runs that a cold start is to learn from."""

    runs: tuple[Trajectory, ...]
    figures: Mapping[str, Mapping[str, int]]
    """By the branch taken: `runs` that were judged, the `right` ones, those of them with a reply that was `cut off` at
    the limit, the `kept` ones, and `questions` whose lesson it is."""

    @property
    def questions(self) -> int:
        """Questions with a run to learn from."""
        return sum(self.figures["questions"].values())


def choose_runs(
    runs: Sequence[Trajectory],
    verify: Callable[[Question, str], bool | None],
    *,
    longest: int,
    tokenizer: Any = None,
) -> Lessons:
    """Of a model's own runs down each branch those to start it from: right ones, of the branch that suits the question.

    Direct suits where it is right half the time, or as often as with a tool: there a call is redundant. A direct run is
    learnt under the prompt that a free run of its question had, with the tools in it, which is what the policy sees;
    where no free run of the question finished, under its own. Two different runs of a question are kept at most.

    Args:
        runs: Of each question some down each branch, with their tokens.
        verify: Judges the answers.
        longest: Tokens at which replies were cut off; such a run teaches to ramble, and is not kept.
        tokenizer: The model's. With it a reply that has made its call and then rambled to the limit is kept up to the
            end of that call, and teaches to stop there.
    """
    by_question: dict[str, dict[str, list[tuple[Trajectory, bool]]]] = defaultdict(lambda: defaultdict(list))
    prompts: dict[str, tuple[int, ...]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("runs", "right", "cut off", "kept", "questions")}
    for run, right, _ in judged(runs, verify):
        if run.branch == "free" and run.calls and run.calls[0].prompt_ids:
            prompts[run.question.id] = run.calls[0].prompt_ids
        if right is not None:
            branch = branch_of(run)
            run = replace(run, calls=tuple(_ended(call, longest, tokenizer) for call in run.calls)) if right else run
            by_question[run.question.id][branch].append((run, right))
            counts["runs"][branch] += 1
            counts["right"][branch] += right
            counts["cut off"][branch] += right and any(len(call.completion_ids or ()) >= longest for call in run.calls)
    kept: list[Trajectory] = []
    for question_id, found in by_question.items():
        share = {branch: sum(right for _, right in tried) / len(tried) for branch, tried in found.items()}
        direct, tool = share.get("direct", 0.0), share.get("tool", 0.0)
        suits = "direct" if direct and direct >= min(0.5, tool) else "tool"
        different: dict[Any, Trajectory] = {}
        for run, right in found.get(suits, ()):
            written = tuple(call.completion_ids or () for call in run.calls)
            if right and all(0 < len(ids) < longest for ids in written):
                different.setdefault(written, run)
        chosen = list(different.values())[:2]
        asked = prompts.get(question_id) if suits == "direct" else None
        kept += [
            replace(run, calls=(replace(run.calls[0], prompt_ids=asked), *run.calls[1:])) if asked else run
            for run in chosen
        ]
        counts["kept"][suits] += len(chosen)
        counts["questions"][suits] += bool(chosen)
    return Lessons(
        runs=tuple(kept), figures={name: {"direct": it["direct"], "tool": it["tool"]} for name, it in counts.items()}
    )


def _ended(call: ModelCall, longest: int, tokenizer: Any) -> ModelCall:
    """A model call whose reply was cut off after a tool's call, as if it had ended there."""
    ids = call.completion_ids or ()
    if tokenizer is None or len(ids) < longest or not call.tool_calls:
        return call
    for length in range(1, len(ids)):
        if "</tool_call>" in tokenizer.decode(ids[:length]):
            ended = (*ids[:length], tokenizer.eos_token_id)
            return replace(call, completion_ids=ended, log_probs=None, allowed_log_probs=None)
    return call
