"""Would stopping here have been as good? Verdicts on probes, from a reference, from feedback, or by agreement.

Verdicts are never invented. Where a question has a reference answer, its verifier rules. Elsewhere a probe *agrees*
or does not: would it have told the user what the run's own answer told (see `judging.judge`)? A run whose users said
that it was bad is left out, since agreeing with it would be no merit. An acting call that the probe names is compared
with the run's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metis_agent.audit.probes import Probe
from metis_agent.audit.turns import RecordedTurn
from metis_agent.errors import JudgeUnavailableError
from metis_agent.judging.judge import Agreement, AgreementJudge, Pair, PairJudge, compare, feedback_of
from metis_agent.judging.verifiers import VERIFIERS, Verifier

__all__ = ["Agreement", "AgreementJudge", "Verdicts", "left_out", "next_act", "pair_of"]

_CONTEXT = 2_000


@dataclass(kw_only=True)
class Verdicts:
    """Verdicts on the states of turns.

    Args:
        judge: For pairs that no comparison decides; without one they have no verdict.
        verifiers: For questions with a reference answer, by name.
    """

    judge: PairJudge | None = None
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
