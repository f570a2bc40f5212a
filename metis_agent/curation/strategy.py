"""Stage `strategy`, (c) of the paper: a judge keeps runs that use their tools strategically.

Relevance, coherence, rationale: all three must hold, by a rubric that is a file to edit. A run holds text by
strangers (search results), which may address the judge. So what is kept is ruled on once more under a question that
it has nothing to do with: a run that is "relevant" there too steers the judge, and is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel, Field

from metis_agent.curation.stage import KEEP, Row, Verdict, drop, keep, undecided
from metis_agent.judging.cache import DiskCache
from metis_agent.judging.rubric import Asking, RubricJudge, Ruling
from metis_agent.types import Trajectory

__all__ = ["StrategyStage", "StrategyVerdict"]


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
