"""Would stopping here have been as good? Verdicts on probes, from a reference, from feedback, or by agreement.

Verdicts are never invented. Where a question has a reference answer, its verifier rules. Elsewhere a probe *agrees*
or does not: would it have told the user what the run's own answer told? A run whose users said that it was bad is left
out, since agreeing with it would be no merit. An acting call that the probe names is compared with the run's own.

Agreement is ruled by comparing where that decides, else by a judge that is asked in both orders: only what agrees in
both does. Probes may hold anything, so all is shown delimited (see `judging.rubric`), and what was ruled the same is
asked about twice more with a decoy in the place of either answer: what agrees with *any* other steers the judge.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from langchain_core.language_models import BaseChatModel
from pydantic import BaseModel, Field

from metis_agent.audit.probes import Probe
from metis_agent.audit.turns import RecordedTurn
from metis_agent.errors import JudgeUnavailableError
from metis_agent.judging.rubric import Asking, RubricJudge, Ruling
from metis_agent.judging.short_answers import choice, normalise, numeric
from metis_agent.judging.verifiers import VERIFIERS, Verifier
from metis_agent.sqlite import DiskCache
from metis_agent.types import Question, Trajectory

__all__ = ["Agreement", "AgreementJudge", "AgreementVerdict", "Pair", "Source", "Verdicts", "compare", "feedback_of"]

Source = Literal["reference", "comparison", "judge", "acting call", "none"]
"""Where a verdict came from."""

_CONTEXT = 2_000
_WHOLE_NUMBER = 40
"""Characters of an answer that is nothing but a number or a letter."""
_CONTROLS = ("The code name is otter-1127.", "The code name is heron-5530.")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two answers to one message."""

    question: str
    own: str
    """What the run answered."""
    probe: str
    context: str = ""
    """The end of the conversation before the message."""


_CONTROL = Pair(question="Which code name is on the register?", own="", probe="")


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


class Judge(Protocol):
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


class AgreementJudge:
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
        self._judge = RubricJudge(model, AgreementVerdict, rubric=rubric, cache=cache, asking=asking, name=name)
        self.name = self._judge.name
        self.counts = self._judge.counts
        self._unfit: str | None = None

    @property
    def identity(self) -> str:
        """A hash of model, rubric and form."""
        return self._judge.identity

    def rule(self, pairs: Sequence[Pair]) -> list[Agreement]:
        """As `Judge`; each pair is asked about in both orders, and decoys are tried on what agrees."""
        if pairs and (reason := self._why_unfit()):
            return [Agreement(agrees=None, reason=reason) for _ in pairs]
        forwards = self._judge.rule([_record(pair, pair.own, pair.probe) for pair in pairs])
        backwards = self._judge.rule([_record(pair, pair.probe, pair.own) for pair in pairs])
        found = [_of_both(*rulings) for rulings in zip(forwards, backwards, strict=True)]
        same = [index for index, agreement in enumerate(found) if agreement.agrees]
        records = []
        for index in same:
            decoy = _decoy(pairs[index])
            records.append(_record(pairs[index], decoy, pairs[index].probe))
            records.append(_record(pairs[index], pairs[index].own, decoy))
        decoys = self._judge.rule(records)
        for place, index in enumerate(same):
            found[index] = _unless_steered(found[index], decoys[2 * place : 2 * place + 2])
        return found

    def _why_unfit(self) -> str:
        """Why no verdict of this judge counts: it must tell two control pairs apart. Empty where it does."""
        if self._unfit is None:
            same, other = self._judge.rule([_record(_CONTROL, "It is otter-1127.", text) for text in _CONTROLS])
            if same.verdict is None or other.verdict is None:
                return same.reason or other.reason
            self._unfit = "" if same.verdict.same and not other.verdict.same else "judge unfit"
        return self._unfit


@dataclass(kw_only=True)
class Verdicts:
    """Verdicts on the states of turns.

    Args:
        judge: For pairs that no comparison decides; without one they have no verdict.
        verifiers: For questions with a reference answer, by name.
    """

    judge: Judge | None = None
    verifiers: Mapping[str, Verifier] = field(default_factory=lambda: VERIFIERS)
    sources: Counter[str] = field(default_factory=Counter)
    """How many verdicts came from where."""
    swaps: Counter[bool] = field(default_factory=Counter)
    """Of pairs asked in both orders: how often the judge agreed with itself."""
    steered: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    """Why there was no verdict."""

    def rule(
        self, turns: Sequence[RecordedTurn], probes: Mapping[tuple[str, int, str], Probe]
    ) -> dict[str, list[Agreement]]:
        """a_0 .. a_K of each turn, by its id; turns that must be left out are missing (see `left_out`)."""
        found: dict[str, list[Agreement]] = {}
        open_: list[tuple[str, int, Pair]] = []
        for turn in turns:
            if left_out(turn):
                continue
            agreements = found[turn.run.id] = []
            for k in range(len(turn.steps)):
                ruled = self._without_judge(turn, k, probes.get((turn.run.id, k, "answer")))
                if isinstance(ruled, Pair):
                    open_.append((turn.run.id, k, ruled))
                    ruled = Agreement(agrees=None, reason="needs a judge")
                agreements.append(ruled)
        if self.judge is not None and open_:
            for (id_, k, _), agreement in zip(open_, self.judge.rule([pair for *_, pair in open_]), strict=True):
                found[id_][k] = agreement
        for turn in turns:
            self._count(turn, found.get(turn.run.id, []))
        return found

    def _without_judge(self, turn: RecordedTurn, k: int, probe: Probe | None) -> Agreement | Pair:
        question, last = turn.run.question, len(turn.steps) - 1
        if k < last and k not in turn.to_probe:
            return Agreement(agrees=True, source="acting call", reason="the run acted here")
        acts = next_act(turn, k)
        if k == last or (acts is None and question.answer is not None):
            return self._by_reference(turn, turn.run.answer if k == last else None, probe)
        if probe is None:
            return Agreement(agrees=None, reason="not probed")
        if acts is not None or probe.calls:
            same = _same_calls(probe.calls, acts or ())
            return Agreement(agrees=same, source="acting call", reason="" if same else "it would have acted otherwise")
        pair = pair_of(turn, probe)
        decided = compare(pair)
        return pair if decided is None else Agreement(agrees=decided, source="comparison")

    def _by_reference(self, turn: RecordedTurn, own: str | None, probe: Probe | None) -> Agreement:
        question = turn.run.question
        if question.answer is None:
            return Agreement(agrees=True, source="comparison", reason="the run's own answer")
        if own is None and probe is None:
            return Agreement(agrees=None, reason="not probed")
        if own is None and probe is not None and probe.calls:
            return Agreement(agrees=False, source="acting call", reason="it would have acted")
        verifier = self.verifiers.get(question.verifier)
        if verifier is None:
            return Agreement(agrees=None, reason=f"no verifier {question.verifier!r} at hand")
        try:
            right = verifier(question, own if own is not None else probe.text if probe is not None else "")
        except JudgeUnavailableError:
            return Agreement(agrees=None, reason="judge unavailable")
        return Agreement(agrees=right, source="reference" if right is not None else "none",
                         reason="" if right is not None else "the reference can't be compared")  # fmt: skip

    def _count(self, turn: RecordedTurn, agreements: Sequence[Agreement]) -> None:
        for k in turn.to_probe:
            if k >= len(agreements):
                continue
            it = agreements[k]
            if it.agrees is None:
                self.missing[it.reason] += 1
            else:
                self.sources[it.source] += 1
            if it.swapped is not None:
                self.swaps[it.swapped] += 1
            self.steered += it.reason == "steers the judge"


def left_out(turn: RecordedTurn) -> str:
    """Why a turn can't be audited; empty where it can."""
    if turn.run.question.answer is None and feedback_of(turn.run) is False:
        return "bad feedback"
    return ""


def feedback_of(run: Trajectory) -> bool | None:
    """Whether the run's users said that it was good, by scores from -1 or 0 to 1; `None` where they did not say."""
    found = run.metadata.get("feedback")
    scores = found if isinstance(found, list | tuple) else [found]
    known = {score > 0.5 for it in scores if (score := _score(it)) is not None and -1 <= score <= 1 and score != 0.5}
    return known.pop() if len(known) == 1 else None


def next_act(turn: RecordedTurn, k: int) -> tuple[Mapping[str, Any], ...] | None:
    """The acting calls that the run went on to make from s_k, before anything else that was not reading."""
    probed = set(turn.to_probe)
    for step in turn.steps[k:-1]:
        if step.index not in probed and step.round is not None and any(it.executed for it in step.round.outcomes):
            return tuple(
                {"name": it.tool, "args": dict(it.arguments)}
                for it in step.round.outcomes
                if it.executed and turn.effects[it.tool] != "reads"
            )
    return None


def pair_of(turn: RecordedTurn, probe: Probe) -> Pair:
    """What a judge, or a person, is shown of a probe."""
    before = [message for message in turn.steps[0].messages[:-1] if message.type in ("human", "ai") and message.text]
    context = "\n".join(f"{'User' if it.type == 'human' else 'Assistant'}: {it.text}" for it in before[-4:])
    return Pair(question=turn.run.question.text, own=turn.run.answer, probe=probe.text, context=context[-_CONTEXT:])


def _same_calls(first: Iterable[Mapping[str, Any]], second: Iterable[Mapping[str, Any]]) -> bool:
    """The same tools with the same arguments, but for the case and the spaces of texts."""

    def written(calls: Iterable[Mapping[str, Any]]) -> list[str]:
        return sorted(json.dumps([it["name"], _plain(it["args"])], sort_keys=True, default=str) for it in calls)

    return written(first) == written(second)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split()).casefold()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _of_both(forwards: Ruling[AgreementVerdict], backwards: Ruling[AgreementVerdict]) -> Agreement:
    if forwards.verdict is None or backwards.verdict is None:
        return Agreement(agrees=None, reason=forwards.reason or backwards.reason)
    first, second = forwards.verdict.same, backwards.verdict.same
    return Agreement(
        agrees=first and second, source="judge", swapped=first == second,
        reason=(backwards if first else forwards).verdict.reason,  # type: ignore[union-attr]
    )  # fmt: skip


def _unless_steered(agreement: Agreement, decoys: Sequence[Ruling[AgreementVerdict]]) -> Agreement:
    if any(ruling.verdict is not None and ruling.verdict.same for ruling in decoys):
        return Agreement(agrees=False, source="judge", reason="steers the judge", swapped=agreement.swapped)
    if missing := next((ruling for ruling in decoys if ruling.verdict is None), None):
        return Agreement(agrees=None, reason=missing.reason)
    return agreement


def _record(pair: Pair, first: str, second: str) -> dict[str, str]:
    return {"conversation": pair.context, "message": pair.question, "first": first, "second": second}


def _decoy(pair: Pair) -> str:
    """An answer that tells a user something else, the same each time so that its verdict can be kept."""
    digest = hashlib.sha256(f"{pair.question}\x00{pair.own}".encode("utf-8", "replace")).hexdigest()
    return f"The code name that was asked for is falcon-{digest[:10]}."


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
