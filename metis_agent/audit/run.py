"""An audit in one call: recorded turns are sampled, probed, ruled on, counted, and replayed under rules of stopping.

The command line, a notebook and the page work on its `Findings`.

A person can check the judge: a page with pairs of answers to click through, and the file that comes of it. The pairs
belong to turns drawn at random from those that the judge ruled on, whatever it said, so what the person says corrects
the judge's share without bias (`frontier.corrected_ratio`). The page does not show the judge's verdict, and which of
the two answers was sent is shown in random order: a person who knows either is led by it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from langchain_core.messages import messages_from_dict

from metis_agent.audit.accounting import AuditedTurn, Prices, stretches
from metis_agent.audit.agreement import Agreement, Verdicts, left_out, pair_of
from metis_agent.audit.frontier import RulePoint, best, caps, oracle, replayable, self_report
from metis_agent.audit.kinds import Check, Figures, figures_of, kinds_of
from metis_agent.audit.probes import Probe, ProbePoint, Prober
from metis_agent.audit.stopping import cross_fitted, read_states
from metis_agent.audit.turns import RecordedTurn, Survey
from metis_agent.errors import InputError
from metis_agent.report.document import clipped, html, packaged, page_head

__all__ = ["Findings", "Frontier", "audit", "check_page", "plan_probes", "read_checks"]

Progress = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What rules of stopping would have done, on the turns whose verdicts are all there."""

    turns: int
    full: RulePoint
    """The runs as they were."""
    oracle: RulePoint
    caps: Sequence[RulePoint]
    self_report: RulePoint | None
    gate: Sequence[RulePoint]
    """Cross-fitted, one point a beta; empty where there was too little to learn from."""
    tolerance: float
    """The share of turns that may end worse in what is called best."""

    @property
    def best_cap(self) -> RulePoint:
        """The cap with fewest calls within the tolerance."""
        return best(self.caps, self.full, self.tolerance)

    @property
    def best_gate(self) -> RulePoint | None:
        """The gate with fewest calls within the tolerance."""
        return best(self.gate, self.full, self.tolerance) if self.gate else None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that an audit found."""

    survey: Survey
    turns: Sequence[AuditedTurn]
    """The sampled turns that could be audited, decided or not."""
    probes: Mapping[tuple[str, int, str], Probe]
    agreements: Mapping[str, Sequence[Agreement]]
    """On the states of each turn, by its id."""
    figures: Figures
    frontier: Frontier | None
    """`None` where no turn has all its verdicts."""
    verdicts: Verdicts
    model: str
    """That was probed."""
    judge: str
    """That ruled; "" where there was none."""
    counts: Mapping[str, int]
    """Of probes; see `Prober.counts`."""
    usage: Mapping[str, int]
    """Tokens that the probes took."""
    spent: float
    """Dollars, in this run."""
    left_out: Mapping[str, int]
    """Sampled turns that could not be audited, by the reason."""

    @cached_property
    def recorded(self) -> Mapping[str, RecordedTurn]:
        """The recorded turns of the sample, by id."""
        return {turn.run.id: turn for turn in self.survey.sample}

    def points(self) -> Iterator[dict[str, Any]]:
        """The decision points of each turn with all its verdicts, to train a gate on: rows for `read_outcomes`.

        One row for each state before a round of the turn's last stretch: whether stopping there would have told the
        user the same, whether the run's own answer did, and how many reading calls were still to come.
        """
        for run in replayable(self.turns):
            turn = self.recorded[run.turn.id]
            said = messages_from_dict([dict(message) for message in turn.run.history])
            roles = {"human": "user", "ai": "assistant"}
            history = [
                {"role": roles[message.type], "content": str(message.text)} for message in said if message.type in roles
            ]
            outcomes = [step.round.outcomes if step.round else () for step in turn.steps]
            for k in range(run.rounds):
                done = [it for of_round in outcomes[: run.first + k] for it in of_round if it.executed]
                yield {
                    "run": run.turn.id, "conversation": run.turn.conversation, "step": run.first + k,
                    "question": turn.run.question.text, "history": history,
                    "observations": [
                        {"tool": it.tool, "content": it.content, "failed": it.status != "ok"} for it in done
                    ],
                    "stop_correct": int(run.right[k]), "on_correct": int(run.right[-1]),
                    "on_cost": int(run.calls[-1] - run.calls[k]),
                }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values, for JSON."""
        survey = self.survey
        frontier = self.frontier
        return {
            "model": self.model, "judge": self.judge, "figures": self.figures.to_dict(),
            "store": {
                "turns": survey.turns, "conversations": survey.conversations, "with_calls": survey.with_calls,
                "calls": dict(survey.calls), "left_out": dict(survey.left_out),
                "tools": {name: {"effect": effect, "calls": n} for name, (effect, n) in sorted(survey.tools.items())},
            },
            "frontier": None if frontier is None else {
                "turns": frontier.turns, "tolerance": frontier.tolerance, "full": asdict(frontier.full),
                "oracle": asdict(frontier.oracle), "caps": [asdict(point) for point in frontier.caps],
                "self_report": asdict(frontier.self_report) if frontier.self_report else None,
                "gate": [asdict(point) for point in frontier.gate],
            },
            "verdicts": {
                "sources": dict(self.verdicts.sources), "missing": dict(self.verdicts.missing),
                "judge_same_on_swap": self.verdicts.swaps[True], "judge_other_on_swap": self.verdicts.swaps[False],
                "steers_the_judge": self.verdicts.steered,
            },
            "probes": {**self.counts, **self.usage, "dollars": self.spent}, "left_out": dict(self.left_out),
        }  # fmt: skip


def plan_probes(survey: Survey, *, self_reports: bool = True) -> list[ProbePoint]:
    """What has to be asked, turn by turn, so that a budget that runs out leaves whole turns."""
    points = []
    for turn in survey.sample:
        if left_out(turn):
            continue
        points += [ProbePoint(turn=turn, state=k) for k in turn.to_probe]
        if self_reports:
            *_, (first, last) = stretches(turn.audited([None] * len(turn.steps), Prices()))
            points += [ProbePoint(turn=turn, state=k, ask="done") for k in range(first, last)]
    return points


async def audit(
    survey: Survey,
    prober: Prober,
    verdicts: Verdicts,
    *,
    prices: Prices = Prices(),
    self_reports: bool = True,
    checks: Mapping[tuple[str, int], bool | None] | None = None,
    tolerance: float = 0.02,
    judge: str = "",
    seed: int = 0,
    progress: Progress = lambda: None,
) -> Findings:
    """Probe the sample, rule, count and replay.

    Args:
        survey: With its sample.
        prober: Asks the model; what it was asked before costs nothing.
        verdicts: Rules on what it said.
        prices: Of models and tools.
        self_reports: Also ask the model whether it could answer, as the baseline that people would try.
        checks: A person's verdicts by turn and state (see `checking`); `None` where they could not say.
        tolerance: The share of turns that may end worse in what the frontier calls best.
        judge: The judge's name, for the page.
        seed: Of bootstrap, folds and clusters.
        progress: Called after each probe.

    Raises:
        InputError: there is no turn with a reading call.
        InfrastructureError: the model can't be reached; what was paid for is kept.
    """
    if not survey.sample:
        raise InputError(_why_empty(survey))
    probes = await prober.ask(plan_probes(survey, self_reports=self_reports), progress=progress)
    agreements = verdicts.rule(survey.sample, probes)
    used = [turn for turn in survey.sample if turn.run.id in agreements]
    kinds = kinds_of([turn.run.question.text for turn in used], [turn.run.question.kind for turn in used], seed=seed)
    turns = [
        turn.audited([it.agrees for it in agreements[turn.run.id]], prices, kind=kind)
        for turn, kind in zip(used, kinds, strict=True)
    ]
    figures = figures_of(
        turns, all_turns=survey.turns, all_calls=survey.calls["reads"], all_with_calls=survey.with_calls,
        check=_check(turns, agreements, checks) if checks else None, seed=seed,
    )  # fmt: skip
    return Findings(
        survey=survey, turns=turns, probes=probes, agreements=agreements, figures=figures,
        frontier=_frontier(turns, used, probes, tolerance, seed), verdicts=verdicts, model=prober.name, judge=judge,
        counts=dict(prober.counts), usage=dict(prober.usage), spent=prober.spent,
        left_out=Counter(reason for turn in survey.sample if (reason := left_out(turn))),
    )  # fmt: skip


def _frontier(
    turns: Sequence[AuditedTurn],
    recorded: Sequence[RecordedTurn],
    probes: Mapping[tuple[str, int, str], Probe],
    tolerance: float,
    seed: int,
) -> Frontier | None:
    runs = replayable(turns)
    if not runs:
        return None
    by_id = {turn.run.id: turn for turn in recorded}
    done = {(id_, state): probe.says_yes for (id_, state, ask), probe in probes.items() if ask == "done"}
    readings = [read_states(by_id[run.turn.id], run.first) for run in runs]
    capped = caps(runs, seed=seed)
    return Frontier(
        turns=len(runs), full=replace(capped[-1], rule="as it was", setting=None), oracle=oracle(runs, seed=seed),
        caps=capped, self_report=self_report(runs, done, seed=seed), gate=cross_fitted(runs, readings, seed=seed),
        tolerance=tolerance,
    )  # fmt: skip


def _check(
    turns: Sequence[AuditedTurn],
    agreements: Mapping[str, Sequence[Agreement]],
    checks: Mapping[tuple[str, int], bool | None],
) -> Check:
    """The turns of which a person has said something on every state that a judge ruled on."""
    fallible, checked, pairs, wrong = set[str](), dict[str, AuditedTurn](), 0, 0
    for turn in turns:
        judged = [k for k, it in enumerate(agreements[turn.id]) if it.source == "judge" and it.agrees is not None]
        if not judged or not turn.decided:
            continue
        fallible.add(turn.id)
        said = {k: checks.get((turn.id, k)) for k in judged}
        if None in said.values():
            continue
        pairs += len(said)
        wrong += sum(turn.verdicts[k] != right for k, right in said.items())
        verdicts = tuple(said.get(k, before) for k, before in enumerate(turn.verdicts))
        checked[turn.id] = replace(turn, verdicts=verdicts)
    return Check(turns=checked, fallible=frozenset(fallible), pairs=pairs, wrong=wrong)


def _why_empty(survey: Survey) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in survey.left_out.most_common()) or "none"
    said = f"No turn has a call of a tool that only reads: {survey.turns:,} turns count, left out are {reasons}."
    if survey.undeclared:
        tools = " ".join(f"--reads {tool}" for tool in survey.undeclared[:5])
        return (
            f"{said} Nobody said of {survey.undeclared[:20]!r} whether they only read: say it, such as {tools}, and "
            "name those that book, mail or write with --acts."
        )
    return f"{said} Check that the store holds an agent's own runs, and which tools are named with --acts."


_SHOWN = 6_000


def check_page(findings: Findings, turns: int) -> str:
    """The page for so many turns.

    Raises:
        InputError: no verdict came from a judge, so there is nothing to check.
    """
    items = list(_items(findings, turns))
    if not items:
        raise InputError("No verdict of this audit came from a judge, so there is nothing for a person to check.")
    shown = "".join(_item(number, item, len(items)) for number, item in enumerate(items, 1))
    script = packaged("check.js", "metis_agent.audit")
    head = page_head("Check the judge", packaged("page.css") + packaged("audit.css", "metis_agent.audit"), script)
    return (
        f"{head}<body><header class=page><h1>Would both tell the user the same?</h1><p class=about>{len(items)} pairs "
        "of answers to the same message. One was sent; the other is what the model said without the tool calls that "
        "followed. Which is which is not shown, and does not matter. When you are through, save the file and run the "
        "audit again with <code>--checked FILE</code>.</p></header><main>"
        f"<ol class=pairs>{shown}</ol><p class=save><button type=button id=save>Save the verdicts</button> "
        "<span id=said role=status>0 said</span></p></main>"
        f"<script>{script}</script></body></html>\n"
    )


def read_checks(path: Path) -> dict[tuple[str, int], bool | None]:
    """A person's verdicts, by turn and state; `None` where they could not say.

    Raises:
        InputError: the file can't be read, or is not what the page saves.
    """
    found: dict[tuple[str, int], bool | None] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the checks {str(path)!r} can't be read: {error}. Save them from the page.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            agrees = row["agrees"]
            if not (agrees is None or isinstance(agrees, bool)):
                raise ValueError(f"agrees is {agrees!r}")
            found[str(row["turn"]), int(row["state"])] = agrees
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{str(path)!r}, line {number}, is no verdict: {error}. A line is {{"turn": "...", "state": 0, '
                '"agrees": true}, with false or null where they differ or nobody can say.'
            ) from error
    return found


def _items(findings: Findings, turns: int) -> Iterator[dict[str, Any]]:
    """The judged states of the first turns of the sample, which is in random order."""
    left = turns
    for turn in findings.turns:
        judged = _judged(findings.agreements[turn.id])
        if not judged or not turn.decided:
            continue
        if left == 0:
            return
        left -= 1
        recorded = findings.recorded[turn.id]
        for k in judged:
            pair = pair_of(recorded, findings.probes[turn.id, k, "answer"])
            answers = [pair.own, pair.probe]
            if _coin(f"{turn.id}/{k}"):
                answers.reverse()
            yield {"turn": turn.id, "state": k, "context": pair.context, "question": pair.question, "answers": answers}


def _judged(agreements: Sequence[Agreement]) -> list[int]:
    return [k for k, it in enumerate(agreements) if it.source == "judge" and it.agrees is not None]


def _coin(text: str) -> bool:
    """Fair, and the same for the same text."""
    return bool(hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] & 1)


def _item(number: int, item: Mapping[str, Any], count: int) -> str:
    context = f"<details><summary>The conversation before</summary><p class=said>{_text(item['context'])}</p></details>"
    answers = "".join(f"<div class=answer><p class=said>{_text(answer)}</p></div>" for answer in item["answers"])
    choices = "".join(
        f'<label class=chip><input type=radio name="p{number}" value="{value}"> {said}</label>'
        for value, said in (("true", "The same"), ("false", "Not the same"), ("null", "I can't say"))
    )
    return (
        f'<li data-turn="{html(item["turn"], 2000)}" data-state="{item["state"]}"><h2>{number} of {count}</h2>'
        f"{context if item['context'] else ''}<p class=asked>{_text(item['question'])}</p>"
        f"<div class=answers>{answers}</div><fieldset><legend>A user who reads only one of them learns</legend>"
        f"{choices}</fieldset></li>"
    )


def _text(text: str) -> str:
    return escape(clipped(text, _SHOWN))
