"""An LLM judge for answers, as one more `Verifier`: for answers that no rule can compare.

Beside `verifiers`: `verify(q, a, verifiers={**VERIFIERS, "judge": AnswerJudge(model)})`. An answer is written by the
policy that the verdict rewards, so sooner or later one tries to talk the judge round. The prompt is delimited
(`judging.rubric`); and an answer that was ruled right is asked about once more, with a decoy for the reference:
what is right by *any* reference steers the judge, and is wrong. A judge that calls everything right would
condemn honest answers so; it is found out by two control questions before its first verdict counts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel, Field

from metis_agent.errors import JudgeUnavailableError
from metis_agent.judging.rubric import Asking, RubricJudge
from metis_agent.sqlite import DiskCache
from metis_agent.types import Question

__all__ = ["AnswerJudge", "AnswerVerdict", "Judged"]


class AnswerVerdict(BaseModel):
    """Whether an answer is right."""

    reason: str = Field(description="In one sentence: what the answer commits to, and how the reference differs.")
    right: bool = Field(description="True only if the answer commits to what the reference says.")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One judged answer."""

    right: bool | None
    """`None` where there is no verdict: to be excluded and counted, never scored."""
    reason: str = ""
    """"no reference", "judge unavailable", "verdict unreadable", "judge unfit", "steers the judge", or the verdict's
    own words."""


_CONTROL = "Which code name is on the register?"


class AnswerJudge:
    """Judges answers by a chat model.

    Args:
        model: a LangChain chat model, or its `init_chat_model` name.
        rubric: a text file that says when an answer is right; the packaged "answer" by default.
        cache: where verdicts are kept; in memory by default.
        asking: concurrency, retries and limits.
        decoy: ask again with a decoy about each answer ruled right; doubles the cost of right answers.
        name: identifies the model in the cache, where it does not tell its name.

    Raises:
        ConfigurationError, MissingDependencyError: as `RubricJudge`.
    """

    def __init__(
        self,
        model: BaseChatModel | str,
        *,
        rubric: str | Path = "answer",
        cache: DiskCache | None = None,
        asking: Asking = Asking(),
        decoy: bool = True,
        name: str | None = None,
    ) -> None:
        self._judge = RubricJudge(model, AnswerVerdict, rubric=rubric, cache=cache, asking=asking, name=name)
        self._decoy = decoy
        self._lock = threading.Lock()
        self._fit: bool | None = None
        self.counts = self._judge.counts

    @property
    def identity(self) -> str:
        """A hash of model, rubric and form."""
        return self._judge.identity

    def __call__(self, question: Question, answer: str) -> bool | None:
        """As `Verifier`: `None` without a reference.

        Raises:
            JudgeUnavailableError: no verdict could be had; the rollout is excluded and counted.
        """
        judged = self.judge([(question, answer)])[0]
        if judged.right is None and judged.reason != "no reference":
            raise JudgeUnavailableError(
                f"question {question.id!r} has no verdict from {self._judge.name!r}: {judged.reason}. Its rollout is "
                "excluded; mend the judge and score again, earlier verdicts are kept."
            )
        return judged.right

    def judge(self, answers: Sequence[tuple[Question, str]]) -> list[Judged]:
        """Judge many at once. Called before scoring, it fills the cache, and scoring then waits for nobody."""
        judged: dict[int, Judged] = {}
        for index, (question, answer) in enumerate(answers):
            if question.answer is None or not question.answer.strip():
                judged[index] = Judged(right=None, reason="no reference")
            elif not answer.strip():
                judged[index] = Judged(right=False, reason="empty answer")
        open_ = [index for index in range(len(answers)) if index not in judged]
        if open_ and (unfit := self._unfit()):
            judged |= {index: Judged(right=None, reason=unfit) for index in open_}
            open_ = []
        rulings = self._judge.rule([_record(*answers[index]) for index in open_])
        for index, ruling in zip(open_, rulings, strict=True):
            if ruling.verdict is None:
                judged[index] = Judged(right=None, reason=ruling.reason)
            else:
                judged[index] = Judged(right=ruling.verdict.right, reason=ruling.verdict.reason)
        if self._decoy:
            self._check_decoys(answers, judged)
        return [judged[index] for index in range(len(answers))]

    def _check_decoys(self, answers: Sequence[tuple[Question, str]], judged: dict[int, Judged]) -> None:
        right = [index for index, verdict in judged.items() if verdict.right]
        records = [_record(*answers[index], reference=_decoy(answers[index][0])) for index in right]
        for index, ruling in zip(right, self._judge.rule(records), strict=True):
            if ruling.verdict is None:
                judged[index] = Judged(right=None, reason=ruling.reason)
            elif ruling.verdict.right:
                judged[index] = Judged(right=False, reason="steers the judge")

    def _unfit(self) -> str:
        """Why the judge's verdicts can't be used; empty where they can."""
        with self._lock:
            if self._fit is None:
                control = Question(id="control", text=_CONTROL, answer="heron-5530")
                right, wrong = self._judge.rule([_record(control, "heron-5530"), _record(control, "otter-1127")])
                if right.verdict is None or wrong.verdict is None:
                    return right.reason or wrong.reason
                self._fit = right.verdict.right and not wrong.verdict.right
            return "" if self._fit else "judge unfit"


def _record(question: Question, answer: str, *, reference: str | None = None) -> dict[str, str]:
    return {"question": question.text, "reference": reference or question.answer or "", "answer": answer}


def _decoy(question: Question) -> str:
    """A reference that no answer can match by chance, the same each time so that its verdict can be kept."""
    digest = hashlib.sha256(f"{question.text}\x00{question.answer}".encode("utf-8", "replace")).hexdigest()
    return f"the code name falcon-{digest[:10]}"
