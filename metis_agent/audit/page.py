"""The audit as one HTML file: the headline, the bars, the frontier, and runs to look at with what the probes said.

No script: what folds is the browser's own. Everything that a record holds is escaped and made visible; the policy of
`report.document` keeps the rest out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from metis_agent.audit.accounting import AuditedTurn, Use, harmful_rounds, uses
from metis_agent.audit.agreement import Agreement
from metis_agent.audit.frontier import RulePoint
from metis_agent.audit.kinds import Row
from metis_agent.audit.probes import Probe
from metis_agent.audit.run import Findings, Frontier
from metis_agent.audit.summary import (
    count,
    duration,
    frontier_words,
    headline,
    money,
    outcome_word,
    percent,
    remarks,
    share,
)
from metis_agent.evaluation.agents import Estimate
from metis_agent.report.charts import Axis, Mark, Series, chart, legend
from metis_agent.report.document import clipped, html, packaged, page_head, plural, version
from metis_agent.report.sections import table

__all__ = ["audit_page"]

_ROWS, _RUNS, _TEXT, _LINE = 16, 8, 4_000, 90
_LOGO = (
    '<svg viewBox="0 0 32 32" aria-hidden="true"><circle cx="16" cy="16" r="15"/><path d="M9 22V11l7 7 7-7v11"/></svg>'
)
_BADGES: dict[Use, tuple[str, str]] = {
    "redundant": ("changed nothing", "wrong"), "necessary": ("needed", "right"), "lost": ("in vain", ""),
    "acting": ("acts", "gone"), "undeclared": ("not known what it does", "gone"), "undecided": ("no verdict", "gone"),
}  # fmt: skip


def audit_page(findings: Findings, title: str) -> Iterator[str]:
    """The page, piece by piece."""
    style = packaged("page.css") + packaged("audit.css", "metis_agent.audit")
    survey = findings.survey
    yield page_head(title, style)
    yield (
        '<body>\n<a class="skip" href="#runs-to-see">Skip to the runs</a>\n<header class="page"><div class="brand">'
        f"{_LOGO}<h1>{escape(clipped(title, 200))}</h1></div><p class=about>{plural(survey.turns, 'turn')} of "
        f"{plural(survey.conversations, 'conversation')}; {plural(findings.figures.sampled, 'turn')} with calls, "
        "drawn at "
        f"random, were probed with <code>{html(findings.model)}</code>.</p></header>\n<main>\n"
        '<section id="saved" aria-labelledby="h"><h2 id="h" class="quiet">What the calls changed</h2>'
        f'<p class="verdict">{escape(headline(findings))}</p>{_cards(findings)}</section>\n'
    )
    yield _section("tools", "By tool", _rows(findings.figures.by_tool, "tool", html))
    yield _section("rounds", "By round of the run", _rows(findings.figures.by_position, "round", _round))
    if len(findings.figures.by_kind) > 1:
        yield _section(
            "kinds", "By kind of question", _rows(findings.figures.by_kind, "kind", lambda it: html(it) or "no kind")
        )
    if findings.frontier is not None:
        yield _section("frontier", "What a rule could save", _frontier(findings, findings.frontier))
    yield _section("runs-to-see", "Runs to look at", "".join(_runs(findings)))
    yield _section("method", "How this was measured", _method(findings))
    yield (
        f"</main>\n<footer><p>Made by <code>metis audit</code> {version()}. One file, nothing loaded from anywhere.</p>"
        "</footer>\n</body>\n</html>\n"
    )


def _section(id_: str, heading: str, inside: str) -> str:
    return f'<section id="{id_}"><h2>{heading}</h2>{inside}</section>\n'


# --- the top ------------------------------------------------------------------------------------------------


def _cards(findings: Findings) -> str:
    figures = findings.figures
    if figures.doubtful:
        return ""
    cards = [
        _card("Changed nothing", share(figures.redundant), _interval(figures.redundant), "of the calls that read"),
        _card("They cost", money(figures.dollars.value or 0.0), _span(money, figures.dollars),
              "tools, and the model reading their results")
        if figures.dollars.value else
        _card("They took", f"{count(figures.tokens.value or 0.0)} tokens", _span(count, figures.tokens), "unpriced"),
        _card("And made users wait", duration(figures.seconds.value), _span(duration, figures.seconds), "in all")
        if figures.seconds.value else "",
        _card("Did harm", share(figures.harmful), _interval(figures.harmful), "took a good answer away")
        if figures.harmful.value else "",
        _card("Were needed", share(figures.necessary), _interval(figures.necessary), "the answer hung on them"),
        _card("Were in vain", share(figures.lost), _interval(figures.lost), "the run was wrong at every step")
        if figures.lost.value else "",
    ]  # fmt: skip
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _card(heading: str, large: str, interval: str, words: str) -> str:
    return (
        f'<li><h3>{heading}</h3><p class="large">{large}</p><p>{words}</p>'
        + (f'<p class="interval">{interval}</p>' if interval else "")
        + "</li>"
    )


def _interval(estimate: Estimate) -> str:
    return (
        ""
        if estimate.low is None or estimate.high is None
        else f"{100 * estimate.low:.0f} to {100 * estimate.high:.0f}%"
    )


def _span(word: Callable[[float], str], estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{word(max(0.0, estimate.low))} to {word(estimate.high)}"


# --- bars ---------------------------------------------------------------------------------------------------


def _rows(rows: Sequence[Row], what: str, name: Callable[[str], str]) -> str:
    if not rows:
        return "<p>No call could be judged.</p>"
    keys = "".join(
        f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true"><rect class="{use}" width="14" height="14" '
        'rx="3"/></svg>'
        f"{said}{'; ' if use != 'lost' else '.'}"
        for use, said in (("redundant", "changed nothing"), ("necessary", "needed"), ("lost", "in vain"))
    )
    items = "".join(
        f"<li><h3>{name(row.name)}<small>{plural(row.calls, 'call')}</small></h3>{_bar(row)}"
        f'<p class="words">{share(row.redundant)}<small>{_interval(row.redundant)}</small></p>'
        f'<p class="cost">{_price(row)}</p></li>'
        for row in rows[:_ROWS]
    )
    figures = [
        [name(row.name), f"{row.calls:,}", percent(row.redundant), share(row.necessary), share(row.lost),
         share(row.harmful), money(row.dollars), duration(row.seconds)]
        for row in rows
    ]  # fmt: skip
    head = [what.capitalize(), "Calls", "Changed nothing", "Needed", "In vain", "Harmful", "Cost", "Time"]
    said = f"{keys} Calls of the probed turns, below them the 95% interval; cost is of all turns."
    return (
        (f'<p class="notes">{said}</p>' if what == "tool" else "")
        + f'<ul class="rows">{items}</ul><details><summary>Figures as a table</summary>'
        f"{table(f'Figures by {what}', head, figures)}</details>"
    )


def _price(row: Row) -> str:
    return money(row.dollars) if row.dollars else duration(row.seconds) if row.seconds else ""


def _bar(row: Row) -> str:
    drawn, at = [], 0.0
    for use in ("redundant", "necessary", "lost"):
        width = 1000 * (getattr(row, use).value or 0.0)
        drawn.append(f'<rect class="{use}" x="{at:.1f}" y="2" width="{width:.1f}" height="13"/>')
        at += width
    low, high = row.redundant.low, row.redundant.high
    if low is not None and high is not None:
        drawn.append(f'<line class="whisker" x1="{1000 * low:.1f}" x2="{1000 * high:.1f}" y1="19" y2="19"/>')
    label = f"changed nothing {percent(row.redundant)}, needed {share(row.necessary)}, in vain {share(row.lost)}"
    return (
        f'<svg class="bar" viewBox="0 0 1000 22" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"{''.join(drawn)}</svg>"
    )


def _round(number: str) -> str:
    names = {"1": "First round", "2": "Second round", "3": "Third round"}
    return names.get(number, f"Round {html(number)}")


# --- the frontier -------------------------------------------------------------------------------------------


def _frontier(findings: Findings, frontier: Frontier) -> str:
    series = [
        Series(name="no rule could do better", tone=2, marks=[_mark(frontier.oracle)]),
        Series(name="the runs as they were", tone=1, marks=[_mark(frontier.full)]),
        Series(name="at most so many rounds a turn", tone=7, line=[_at(point) for point in _sorted(frontier.caps)]),
    ]
    if frontier.self_report is not None:
        series.append(Series(name="asking the model whether it is done", tone=3, marks=[_mark(frontier.self_report)]))
    if frontier.gate:
        gate = [Mark(at=_at(point)) for point in frontier.gate]
        line = [_at(point) for point in _sorted(frontier.gate)]
        series.append(Series(name="a gate trained on the spot, cross-fitted", tone=0, line=line, marks=gate))
    changed = outcome_word(findings)
    words = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>" for name, said in frontier_words(frontier, changed=changed)
    )
    heights = [it.right.value or 0.0 for it in (frontier.full, frontier.oracle, *frontier.caps, *frontier.gate)]
    low, high = min(heights), max(heights)
    room = max(0.03, 0.08 * (high - low))
    y = Axis(label=changed, low=max(0.0, low - room), high=min(1.0, high + room))
    title = f"Share {changed} against the share of calls made"
    points = [
        frontier.full,
        frontier.oracle,
        *frontier.caps,
        *([frontier.self_report] if frontier.self_report else []),
        *frontier.gate,
    ]
    rows = [[html(_rule_name(point)), percent(point.calls), percent(point.right)] for point in points]
    survey = findings.survey
    acting = (
        " No rule stops before an acting call that the run went on to make, so calls before one are not saved here."
        if survey.calls["acts"] or survey.calls["unknown"]
        else ""
    )
    few = (
        "" if frontier.gate else "<p>There are too few runs here, or no scikit-learn, to train a gate on the spot.</p>"
    )
    return (
        f"<p>{plural(frontier.turns, 'turn')} replayed: a rule stops each run where it says so, and what would have "
        f"come of it is known. The best settings are those with at most {frontier.tolerance:.0%} of the turns ending "
        f"worse.{acting}</p>"
        f'<div class="two"><figure><figcaption>Share {changed} (upwards)</figcaption>'
        f"{chart(title, Axis(label='calls made, of those that the runs made'), y, series)}{legend(series)}</figure>"
        f'<dl class="rules">{words}</dl></div>{few}<details><summary>Figures as a table</summary>'
        f"{table(title, ['Rule', 'Calls made', 'Ends well'], rows)}</details>"
    )


def _rule_name(point: RulePoint) -> str:
    if point.setting is None:
        return point.rule
    return f"cap {point.setting:.0f}" if point.rule == "cap" else f"{point.rule}, beta {point.setting:g}"


def _at(point: RulePoint) -> tuple[float, float]:
    return point.calls.value or 0.0, point.right.value or 0.0


def _sorted(points: Sequence[RulePoint]) -> list[RulePoint]:
    return sorted(points, key=_at)


def _mark(point: RulePoint) -> Mark:
    def edges(estimate: Estimate) -> tuple[float, float] | None:
        return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)

    return Mark(at=_at(point), across=edges(point.calls), along=edges(point.right))


# --- runs ---------------------------------------------------------------------------------------------------


def _runs(findings: Findings) -> Iterator[str]:
    def wasted(turn: AuditedTurn) -> float:
        return sum(
            call.amount.dollars + 1e-6 * call.amount.seconds + 1e-9 * (1 + call.amount.tokens)
            for calls, labels in zip(turn.rounds, uses(turn), strict=True)
            for call, use in zip(calls, labels, strict=True)
            if use == "redundant"
        )

    def split(turn: AuditedTurn) -> bool:
        return any(it.swapped is False for it in findings.agreements[turn.id])

    def needed(turn: AuditedTurn) -> bool:
        return any("necessary" in labels for labels in uses(turn))

    shown: set[str] = set()
    dear = sorted((turn for turn in findings.turns if turn.decided and wasted(turn)), key=wasted, reverse=True)
    groups: list[tuple[str, list[AuditedTurn]]] = [
        ("Calls that did harm", [turn for turn in findings.turns if any(harmful_rounds(turn))]),
        ("The dearest that changed nothing", dear),
        ("The judge was of two minds", [turn for turn in findings.turns if split(turn)]),
        (
            "Needed: what the model would have said without",
            [turn for turn in findings.turns if turn.decided and needed(turn)],
        ),
        ("No verdict", [turn for turn in findings.turns if not turn.decided]),
    ]
    for heading, turns in groups:
        fresh: list[AuditedTurn] = []
        asked = set[str]()
        for turn in turns:
            question = findings.recorded[turn.id].run.question.text
            if turn.id not in shown and question not in asked and len(fresh) < _RUNS:
                fresh.append(turn)
                asked.add(question)  # one of a kind is enough to look at
        if fresh:
            yield f'<h3 class="group">{heading}</h3>'
        for turn in fresh:
            shown.add(turn.id)
            yield _turn(findings, turn)
    if not shown:
        yield "<p>None.</p>"


def _turn(findings: Findings, turn: AuditedTurn) -> str:
    recorded = findings.recorded[turn.id]
    labels, harmful = uses(turn), harmful_rounds(turn)
    agreements = findings.agreements[turn.id]
    steps = [
        f'<li class="human"><p class="who"><b>User</b></p><p class="said">{_text(recorded.run.question.text)}</p></li>'
    ]
    for k, step in enumerate(recorded.steps):
        if (probe := findings.probes.get((turn.id, k, "answer"))) is not None:
            done = findings.probes.get((turn.id, k, "done"))
            steps.append(_probe(probe, agreements[k], done))
        if step.round is not None and k < len(turn.rounds):
            executed = [outcome for outcome in step.round.outcomes if outcome.executed]
            for outcome, use in zip(executed, labels[k], strict=True):
                said, tone = _BADGES[use]
                harm = ' <span class="badge wrong">harmful</span>' if harmful[k] else ""
                steps.append(
                    f'<li class="tool"><p class="who"><b>{html(outcome.tool)}</b> <span class="badge {tone}">{said}'
                    "</span>"
                    f"{harm}</p><pre>{_json(outcome.arguments)}</pre><p class=said>{_text(outcome.content)}</p></li>"
                )
    steps.append(
        f'<li class="ai"><p class="who"><b>The run answered</b></p><p class="said">{_text(recorded.run.answer)}</p>'
        "</li>"
    )
    calls = sum(map(len, turn.rounds))
    idle = sum(use == "redundant" for of_round in labels for use in of_round)
    gist = f"{plural(calls, 'call')}, {idle} changed nothing" + (f", {html(turn.kind, 80)}" if turn.kind else "")
    return (
        f'<details class="turn"><summary>{html(recorded.run.question.text, 160)}<span class="gist">{gist}</span>'
        "</summary>"
        f'<div class="inside"><ol class="steps">{"".join(steps)}</ol><p class="notes">{html(turn.id)}</p></div>'
        "</details>"
    )


def _probe(probe: Probe, agreement: Agreement, done: Probe | None) -> str:
    said = {True: "as good as what the run did", False: "not as good", None: "no verdict"}[agreement.agrees]
    tone = {True: "right", False: "wrong", None: "gone"}[agreement.agrees]
    why = f" {html(agreement.reason, 400)}" if agreement.reason else ""
    asked = {True: " Asked, it said that it could answer.", False: " Asked, it said that it could not answer yet."}
    calls = "".join(f"<pre>{_text(str(it['name']))} {_json(it['args'])}</pre>" for it in probe.calls)
    text = f'<p class="said">{_text(probe.text)}</p>' if probe.text.strip() else ""
    silent = "" if text or calls else '<p class="said none">It gave no answer.</p>'
    believed = asked.get(done.says_yes, "") if done is not None and done.says_yes is not None else ""
    return (
        f'<li class="probe{"" if agreement.agrees else " no"}"><p class="who"><b>Had it stopped here</b> '
        f'<span class="badge {tone}">{said}</span>{why}{believed}</p>{text}{calls}{silent}</li>'
    )


def _text(text: str) -> str:
    return escape(clipped(text, _TEXT))


def _json(value: Mapping[str, Any]) -> str:
    flat = json.dumps(value, ensure_ascii=False, default=str)
    return _text(flat if len(flat) <= _LINE else json.dumps(value, ensure_ascii=False, indent=1, default=str))


# --- the method ---------------------------------------------------------------------------------------------


def _method(findings: Findings) -> str:
    figures, counts = findings.figures, findings.counts
    listed = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(findings))
    sources = ", ".join(f"{n:,} by {source}" for source, n in findings.verdicts.sources.most_common()) or "none"
    left = ", ".join(f"{n:,} {html(reason)}" for reason, n in findings.survey.left_out.most_common())
    spent = f", {money(findings.spent)} now" if findings.spent else ""
    tokens = sum(findings.usage.values())
    return (
        "<dl><dt>Probe</dt><dd>At each step of a recorded run the model was asked to answer, or to act, from what "
        "the run "
        "had read by then; tools that read were not offered, and none was run. "
        f"{plural(counts.get('asked', 0) + counts.get('cached', 0), 'probe')}, {count(tokens)} tokens{spent}.</dd>"
        "<dt>Changed nothing</dt><dd>Calls after the first step at which the model would have done as well as the run: "
        "given its answer, or the right one where there is a reference; or made the acting call that the run went "
        "on to "
        f"make. Verdicts: {sources}.</dd><dt>Cost</dt><dd>A call that is left out saves its tool's declared cost "
        "and the "
        "model call that would have read its result: what that call read, and the tokens and the time in which the "
        "model "
        "asked for it; the answer is written either way. Totals are scaled from the probed turns to all "
        f"{plural(findings.survey.with_calls, 'turn')} with such calls.</dd><dt>Intervals</dt><dd>95%, by bootstrap "
        "over "
        f"conversations.</dd>{f'<dt>Left out</dt><dd>{left} of the store.</dd>' if left else ''}</dl>"
        f'<h3 class="group">To be read with it</h3><ul class="remarks">{listed or "<li>Nothing.</li>"}</ul>'
        f"<p class=notes>{plural(figures.sampled, 'turn')} audited.</p>"
    )
