"""Stage `answers`: was the run right? A wrong run teaches the wrong thing, however well it used its tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from metis_agent.errors import InfrastructureError
from metis_agent.hdpo.curation.stage import KEEP, Row, Verdict, drop, keep, undecided
from metis_agent.hdpo.judge import AnswerJudge
from metis_agent.hdpo.verifiers import verify as default_verify
from metis_agent.types import Question, Trajectory

__all__ = ["AnswersStage"]


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

    def _of(self, right: bool | None, reason: str) -> Verdict:
        if right is None:
            return keep("answer unverified") if self._unverified == "keep" else drop("answer unverified", reason)
        return KEEP if right else drop("wrong answer", reason)
