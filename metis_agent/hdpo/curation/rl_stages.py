"""The stages of curation for RL: corrupted, mix, disagreement, duplicates. (`leaks` is shared with SFT.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.hdpo.curation.images import image_fault
from metis_agent.hdpo.curation.prompts import Prompt
from metis_agent.hdpo.curation.similarity import SimilarityIndex, fingerprint
from metis_agent.hdpo.curation.stage import KEEP, Row, Verdict, drop, undecided
from metis_agent.hdpo.judge import AnswerJudge
from metis_agent.hdpo.verifiers import VERIFIERS, Verifier
from metis_agent.recording.images import ImageStore
from metis_agent.types import Question

__all__ = ["CorruptedStage", "DisagreementStage", "DuplicatesStage", "MixStage"]


class CorruptedStage:
    """Drops prompts that no policy can be trained on: no text, no checkable reference, missing images, clashes.

    Args:
        verifiers: by name, as `verify` takes them.
        images: where `sha256:` references are looked up; none are there without it.
    """

    name = "corrupted"
    settings: Mapping[str, Any] = {}

    def __init__(self, *, verifiers: Mapping[str, Verifier] = VERIFIERS, images: ImageStore | None = None) -> None:
        self._verifiers, self._images = verifiers, images

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        return [self._verdict(row.value) for row in rows]

    def _verdict(self, prompt: Prompt) -> Verdict:
        question = prompt.question
        if not question.text.strip():
            return drop("no text")
        if prompt.fault:
            return drop(prompt.fault)
        if fault := image_fault(question, self._images):
            return drop("missing image", fault)
        return self._reference(question)

    def _reference(self, question: Question) -> Verdict:
        """A reference that its own verifier does not accept can never be met."""
        if question.answer is None or not question.answer.strip():
            return drop("no reference")
        if question.verifier == "judge":
            return KEEP
        if question.verifier not in self._verifiers:
            return drop("unknown verifier", question.verifier)
        try:
            accepted = self._verifiers[question.verifier](question, question.answer)
        except InfrastructureError as error:
            return undecided("judge unavailable", error)
        except ConfigurationError as error:
            return undecided("verifier not installed", error)
        if not accepted:
            return drop("unverifiable reference", f"{question.verifier} does not accept {question.answer[:200]!r}")
        return KEEP


class MixStage:
    """Keeps prompts with successes and failures: the others have no advantage, and teach nothing.

    Args:
        least_rollouts: judged rollouts that it takes to tell.
        lowest: share of right rollouts; at least, where more than 0.
        highest: at most, where less than 1.
    """

    name = "mix"

    def __init__(self, *, least_rollouts: int = 2, lowest: float = 0.0, highest: float = 1.0) -> None:
        if least_rollouts < 2:
            raise ConfigurationError(f"MixStage(least_rollouts={least_rollouts!r}): a mix takes at least 2.")
        if not 0 <= lowest < highest <= 1:
            raise ConfigurationError(f"MixStage(lowest={lowest!r}, highest={highest!r}): 0 <= lowest < highest <= 1.")
        self._least, self._lowest, self._highest = least_rollouts, lowest, highest
        self.settings: Mapping[str, Any] = {"least_rollouts": least_rollouts, "lowest": lowest, "highest": highest}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        return [self._verdict(row.value) for row in rows]

    def _verdict(self, prompt: Prompt) -> Verdict:
        judged = prompt.right + prompt.wrong
        if judged < self._least:
            detail = f"{judged} judged, {prompt.excluded} excluded"
            return undecided("too few rollouts", detail) if prompt.excluded else drop("too few rollouts", detail)
        detail = f"{prompt.right} of {judged} right"
        if not prompt.right:
            return drop("all wrong", detail)
        if not prompt.wrong:
            return drop("all right", detail)
        share = prompt.right / judged
        if share < self._lowest:
            return drop("too hard", detail)
        return drop("too easy", detail) if share > self._highest else KEEP


class DisagreementStage:
    """Drops prompts on whose answers a judge and the verifier disagree: one of them would teach the wrong thing.

    Args:
        judge: rules on a few of each prompt's answers, right ones and wrong ones.
    """

    name = "disagreement"

    def __init__(self, judge: AnswerJudge) -> None:
        self._judge = judge
        self.settings: Mapping[str, Any] = {"judge": judge.identity}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`."""
        # Where the judge is the verifier there is nobody to disagree with.
        asked = [
            (row.number, row.value.question, answer, right)
            for row in rows
            if row.value.question.verifier != "judge"
            for answer, right in row.value.answers
        ]
        rulings = self._judge.judge([(question, answer) for _, question, answer, _ in asked])
        verdicts = {row.number: KEEP for row in rows}
        for (number, _, answer, right), ruling in zip(asked, rulings, strict=True):
            if ruling.right is None:
                if verdicts[number].outcome == "keep":
                    verdicts[number] = undecided(ruling.reason)
            elif ruling.right != right:
                said = (
                    f"the verifier says {'right' if right else 'wrong'} of {answer[:200]!r}, the judge: {ruling.reason}"
                )
                verdicts[number] = drop("judge disagrees", said)
        return [verdicts[row.number] for row in rows]


class DuplicatesStage:
    """Keeps the first of prompts that are the same, exactly or nearly (see `similarity`).

    Args:
        index: a local file for what was kept; `None` for memory.
        least: Jaccard index from which two questions with the same numbers and the same reference are one.
    """

    name = "duplicates"

    def __init__(self, index: Path | None = None, *, least: float = 0.9) -> None:
        if not 0 < least <= 1:
            raise ConfigurationError(f"DuplicatesStage(least={least!r}): it must be above 0 and at most 1.")
        self._index, self._least = SimilarityIndex(index), least
        self.settings: Mapping[str, Any] = {"least": least}

    def rule(self, rows: Sequence[Row[Prompt]]) -> list[Verdict]:
        """As `Stage`; what a killed run had entered from these rows on is forgotten first."""
        verdicts = []
        self._index.begin_from(rows[0].number)
        for row in rows:
            print_ = fingerprint(row.value.question)
            match = self._index.find(print_, least=self._least, same_answer=True)
            if match is None:
                self._index.add(row.number, row.value.question.id, print_)
                verdicts.append(KEEP)
                continue
            reason = "duplicate" if match.similarity == 1 else "near duplicate"
            verdicts.append(drop(reason, f"of {match.id!r}, similarity {match.similarity:.3f}"))
        self._index.commit()
        return verdicts
