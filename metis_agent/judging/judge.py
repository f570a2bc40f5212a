"""LLM judges: of an answer by its reference, and of two answers by each other, where no rule can compare them.

`AnswerJudge` is one more `Verifier`: `verify(q, a, verifiers={**VERIFIERS, "judge": AnswerJudge(model)})`.
`AgreementJudge` rules where there is no reference: would an answer have told the user what the run's own answer told?
`Agreeing` makes a `Verify` of it.

An answer is written by the policy that the verdict rewards, so sooner or later one tries to talk the judge round. The
prompt is delimited (`judging.rubric`); and what was ruled right, or the same, is asked about once more with a decoy in
the other's place: what is right by *any* reference steers the judge, and is wrong. A judge that calls everything right
would condemn honest answers so; it is found out by two control questions before its first verdict counts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel, Field

from metis_agent.errors import JudgeUnavailableError
from metis_agent.judging.rubric import Asking, RubricJudge, Ruling
from metis_agent.judging.short_answers import choice, normalise, numeric
from metis_agent.judging.verifiers import Verify, ask_ahead, verify
from metis_agent.sqlite import DiskCache
from metis_agent.types import Question, Trajectory

__all__ = [
    "Agreeing",
    "Agreement",
    "AgreementJudge",
    "AgreementVerdict",
    "AnswerJudge",
    "AnswerVerdict",
    "Judged",
    "Pair",
    "PairJudge",
    "Source",
    "compare",
    "feedback_of",
    "own_answers",
]

V = TypeVar("V", bound=BaseModel)
_CONTROL = "Which code name is on the register?"


class _Controlled(Generic[V]):
    """A judge of which no verdict counts until it has told two control records apart."""

    def __init__(
        self, judge: RubricJudge[V], says_yes: Callable[[V], bool], controls: Sequence[dict[str, str]]
    ) -> None:
        self._judge, self._says_yes, self._controls = judge, says_yes, controls
        self._lock = threading.Lock()
        self._fit: bool | None = None
        self.name = judge.name
        self.counts = judge.counts

    @property
    def identity(self) -> str:
        """A hash of model, rubric and form."""
        return self._judge.identity

    def _unfit(self) -> str:
        """Why the judge's verdicts can't be used; empty where they can."""
        with self._lock:
            if self._fit is None:
                yes, no = self._judge.rule(self._controls)
                if yes.verdict is None or no.verdict is None:
                    return yes.reason or no.reason
                self._fit = self._says_yes(yes.verdict) and not self._says_yes(no.verdict)
            return "" if self._fit else "judge unfit"


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


class AnswerJudge(_Controlled[AnswerVerdict]):
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
        control = Question(id="control", text=_CONTROL, answer="heron-5530")
        super().__init__(
            RubricJudge(model, AnswerVerdict, rubric=rubric, cache=cache, asking=asking, name=name),
            lambda verdict: verdict.right,
            [_record(control, "heron-5530"), _record(control, "otter-1127")],
        )
        self._decoy = decoy

    def __call__(self, question: Question, answer: str) -> bool | None:
        """As `Verifier`: `None` without a reference.

        Raises:
            JudgeUnavailableError: no verdict could be had; the rollout is excluded and counted.
        """
        judged = self.judge([(question, answer)])[0]
        if judged.right is None and judged.reason != "no reference":
            raise _unavailable(question, self.name, judged.reason)
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
        decoys = [f"the {_decoy(answers[index][0].text, answers[index][0].answer)}" for index in right]
        records = [_record(*answers[index], reference=decoy) for index, decoy in zip(right, decoys, strict=True)]
        for index, ruling in zip(right, self._judge.rule(records), strict=True):
            if ruling.verdict is None:
                judged[index] = Judged(right=None, reason=ruling.reason)
            elif ruling.verdict.right:
                judged[index] = Judged(right=False, reason="steers the judge")


Source = Literal["reference", "comparison", "judge", "acting call", "none"]
"""Where a verdict came from."""

_WHOLE_NUMBER = 40
"""Characters of an answer that is nothing but a number or a letter."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one message."""

    question: str
    own: str
    """What the run answered."""
    probe: str
    context: str = ""
    """The end of the conversation before the message."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether a pair agrees."""

    agrees: bool | None
    """`None` where nobody could rule."""
    source: Source = "none"
    reason: str = ""
    swapped: bool | None = None
    """Whether the judge said the same in both orders; `None` where it was not asked in both."""


class AgreementVerdict(BaseModel):
    """Whether two answers tell a user the same."""

    reason: str = Field(description="In one sentence: what each answer tells the user, and where they part.")
    same: bool = Field(description="True only if a user learns the same from either.")


class PairJudge(Protocol):
    """Rules on pairs that no comparison decides."""

    def rule(self, pairs: Sequence[Pair]) -> list[Agreement]:
        """An agreement for each pair, in order."""
        ...


def compare(pair: Pair) -> bool | None:
    """What can be said without a judge: equal texts agree, and two numbers or two letters do if they are equal.

    Returns:
        `None` where only a reader can tell.
    """
    if not pair.probe.strip():
        return False
    if normalise(pair.own) and normalise(pair.own) == normalise(pair.probe):
        return True
    if len(pair.own) <= _WHOLE_NUMBER and len(pair.probe) <= _WHOLE_NUMBER:
        reference = Question(id="own", text=pair.question, answer=pair.own)
        for verifier, bare in ((numeric, _is_number), (choice, _is_letter)):
            if bare(pair.own) and bare(pair.probe):
                return verifier(reference, pair.probe)
    return None


class AgreementJudge(_Controlled[AgreementVerdict]):
    """A chat model that rules whether two answers tell a user the same.

    Args:
        model: A LangChain chat model, or its `init_chat_model` name.
        rubric: A text file that says when two answers agree; the packaged "agreement" by default.
        cache: Where verdicts are kept; in memory by default.
        asking: Concurrency, retries and limits.
        name: Identifies the model in the cache, where it does not tell its name.

    Raises:
        ConfigurationError, MissingDependencyError: as `RubricJudge`.
    """

    def __init__(
        self,
        model: BaseChatModel | str,
        *,
        rubric: str | Path = "agreement",
        cache: DiskCache | None = None,
        asking: Asking = Asking(),
        name: str | None = None,
    ) -> None:
        control = Pair(question=_CONTROL, own="", probe="")
        super().__init__(
            RubricJudge(model, AgreementVerdict, rubric=rubric, cache=cache, asking=asking, name=name),
            lambda verdict: verdict.same,
            [_pair(control, "It is otter-1127.", f"The code name is {said}.") for said in ("otter-1127", "heron-5530")],
        )

    def rule(self, pairs: Sequence[Pair]) -> list[Agreement]:
        """As `PairJudge`; each pair is asked about in both orders, and decoys are tried on what agrees."""
        if pairs and (reason := self._unfit()):
            return [Agreement(agrees=None, reason=reason) for _ in pairs]
        forwards = self._judge.rule([_pair(pair, pair.own, pair.probe) for pair in pairs])
        backwards = self._judge.rule([_pair(pair, pair.probe, pair.own) for pair in pairs])
        found = [_of_both(*rulings) for rulings in zip(forwards, backwards, strict=True)]
        same = [index for index, agreement in enumerate(found) if agreement.agrees]
        records = []
        for index in same:
            pair = pairs[index]
            decoy = f"The code name that was asked for is {_decoy(pair.question, pair.own).removeprefix('code name ')}."
            records += [_pair(pair, decoy, pair.probe), _pair(pair, pair.own, decoy)]
        decoys = self._judge.rule(records)
        for place, index in enumerate(same):
            found[index] = _unless_steered(found[index], decoys[2 * place : 2 * place + 2])
        return found


class Agreeing:
    """A `Verify` that rules by agreement where a question has no reference answer: with the free run's own answer.

    Args:
        own: The free run's answer by the question's id (see `own_answers`).
        verify: Rules on questions that have a reference.
        pair_judge: For pairs that no comparison decides; without one they have no verdict.
    """

    def __init__(self, own: Mapping[str, str], *, verify: Verify = verify, pair_judge: PairJudge | None = None) -> None:
        self._own, self._verify, self._pair_judge = own, verify, pair_judge

    def __call__(self, question: Question, answer: str) -> bool | None:
        """Right, or agreeing; `None` where neither can be said.

        Raises:
            JudgeUnavailableError: no verdict could be had; the rollout is excluded and counted.
        """
        pair = self._pair_of(question, answer)
        if pair is None:
            return self._verify(question, answer)
        agrees = compare(pair)
        if agrees is not None or self._pair_judge is None:
            return agrees
        (ruled,) = self._pair_judge.rule([pair])
        if ruled.agrees is None:
            raise _unavailable(question, getattr(self._pair_judge, "name", "the judge"), ruled.reason)
        return ruled.agrees

    def judge(self, answers: Sequence[tuple[Question, str]]) -> None:
        """Ask about many at once; the judges keep their verdicts."""
        pairs = [self._pair_of(*answer) for answer in answers]
        ask_ahead([answer for answer, pair in zip(answers, pairs, strict=True) if pair is None], self._verify)
        if self._pair_judge is not None:
            self._pair_judge.rule([pair for pair in pairs if pair is not None and compare(pair) is None])

    def _pair_of(self, question: Question, answer: str) -> Pair | None:
        own = self._own.get(question.id) if question.answer is None else None
        return None if own is None else Pair(question=question.text, own=own, probe=answer)


def own_answers(runs: Iterable[Trajectory]) -> dict[str, str]:
    """What the free run of each question without a reference answered, by the question's id.

    Of several the one with the smallest id, so that their order does not matter. A run that its users called bad, one
    of a later turn (whose text is no question without what came before), and one without an answer stand for none.
    """
    found: dict[str, tuple[str, str]] = {}
    for run in runs:
        if run.question.answer is not None or run.branch != "free" or run.status != "finished":
            continue
        if run.answer.strip() and not run.metadata.get("turn") and feedback_of(run) is not False:
            found[run.question.id] = min(found.get(run.question.id, (run.id, run.answer)), (run.id, run.answer))
    return {question: answer for question, (_, answer) in found.items()}


def feedback_of(run: Trajectory) -> bool | None:
    """Whether the run's users said that it was good, by scores from -1 or 0 to 1; `None` where they did not say."""
    found = run.metadata.get("feedback")
    scores = found if isinstance(found, list | tuple) else [found]
    known = {score > 0.5 for it in scores if (score := _score(it)) is not None and -1 <= score <= 1 and score != 0.5}
    return known.pop() if len(known) == 1 else None


def _record(question: Question, answer: str, *, reference: str | None = None) -> dict[str, str]:
    return {"question": question.text, "reference": reference or question.answer or "", "answer": answer}


def _pair(pair: Pair, first: str, second: str) -> dict[str, str]:
    return {"conversation": pair.context, "message": pair.question, "first": first, "second": second}


def _decoy(question: str, answer: str | None) -> str:
    """What no answer can match by chance, the same each time so that its verdict can be kept."""
    digest = hashlib.sha256(f"{question}\x00{answer}".encode("utf-8", "replace")).hexdigest()
    return f"code name falcon-{digest[:10]}"


def _unavailable(question: Question, judge: str, reason: str) -> JudgeUnavailableError:
    return JudgeUnavailableError(
        f"question {question.id!r} has no verdict from {judge!r}: {reason}. Its rollout is excluded; mend the judge "
        "and score again, earlier verdicts are kept."
    )


def _of_both(forwards: Ruling[AgreementVerdict], backwards: Ruling[AgreementVerdict]) -> Agreement:
    if forwards.verdict is None or backwards.verdict is None:
        return Agreement(agrees=None, reason=forwards.reason or backwards.reason)
    first, second = forwards.verdict.same, backwards.verdict.same
    said = (backwards if first else forwards).verdict
    assert said is not None
    return Agreement(agrees=first and second, source="judge", swapped=first == second, reason=said.reason)


def _unless_steered(agreement: Agreement, decoys: Sequence[Ruling[AgreementVerdict]]) -> Agreement:
    if any(ruling.verdict is not None and ruling.verdict.same for ruling in decoys):
        return Agreement(agrees=False, source="judge", reason="steers the judge", swapped=agreement.swapped)
    if missing := next((ruling for ruling in decoys if ruling.verdict is None), None):
        return Agreement(agrees=None, reason=missing.reason)
    return agreement


def _is_number(text: str) -> bool:
    return any(character.isdigit() for character in text) and not any(character.isalpha() for character in text)


def _is_letter(text: str) -> bool:
    return len(normalise(text)) == 1 and normalise(text).isalpha()


def _score(value: Any) -> float | None:
    if isinstance(value, Mapping):
        value = value.get("score", value.get("value"))
    if isinstance(value, bool | int | float):
        return float(value)
    return None
