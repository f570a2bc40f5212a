"""The parts of the page below its top, each with a chart, words, and the figures as a table.

A part for which nothing is known says which option brings it: a reader should not wonder what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from metis_agent.evaluation.agents import Estimate
from metis_agent.report.charts import Axis, Mark, Series, chart, legend, range_chart
from metis_agent.report.document import HEADINGS, amount, cell, html, plural, share
from metis_agent.report.facts import CURVES, AtThreshold, Facts, Gate, GateFigures
from metis_agent.report.figures import SHARES, Agent, Change, ToolUse, agent_of, branch_figures, changes, wilson

__all__ = ["branches", "by_kind", "by_tool", "calibration", "frontier", "shadow", "table", "training"]

MANY = 24
"""Kinds and tools shown one by one; rarer ones are counted together."""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is wider than the page; cells are HTML."""
    heads = "".join(f"<th scope=col>{name}</th>" for name in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{inner}</td>' for inner in row[1:])}</tr>" for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html(caption)}"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def by_kind(facts: Facts) -> str:
    """Each kind of question: how often a tool was called, and how often the answer was right."""
    agent = facts.after.agent
    if agent is None:
        return "<p>Needs runs that were not forced.</p>"
    counts = Counter(agent.kinds)
    common = [kind for kind, _ in counts.most_common(MANY if len(counts) <= MANY else MANY - 1)]
    groups = [(kind or "no kind given", frozenset({kind})) for kind in sorted(common)]
    if rare := frozenset(counts) - frozenset(common):
        groups.append((f"{len(rare):,} rarer kinds", rare))
    items, rows = [], []
    for name, kinds in groups:
        found = _of_kinds(facts, agent, kinds)
        items.append(_kind_item(name, sum(counts[kind] for kind in kinds), found))
        for heading, column in (("before", "before"), ("after", "after")):
            estimates = [getattr(found[metric], column) for metric in (*SHARES, "calls", "seconds")]
            if estimates[0].questions or estimates[1].questions:
                cells = [cell(metric, it) for metric, it in zip((*SHARES, "calls", "seconds"), estimates, strict=True)]
                rows.append([f"{html(name)}, {heading}", *cells])
    head = ["Kind", *(HEADINGS[name] for name in (*SHARES, "calls", "seconds"))]
    return (
        f'<p class="notes">{_key(facts)} Lines at 0, 25, 50, 75 and 100%; bars are 95% intervals.</p>'
        f'<ul class="kinds">{"".join(items)}</ul>'
        f"<details><summary>Figures as a table</summary>{table('Figures by kind of question', head, rows)}</details>"
    )


def _key(facts: Facts) -> str:
    shown = [("tone0", '<circle class="dot" cx="8" cy="8" r="4.5"/>', "after")]
    if facts.baseline is not None:
        was = "always calling" if facts.compared == "always" else "before"
        shown.insert(0, ("tone1", '<circle class="hollow" cx="8" cy="8" r="4.5"/>', was))
    return (
        "".join(
            f'<svg class="spot {tone}" viewBox="0 0 16 16" aria-hidden="true">{shape}</svg>{said} '
            for tone, shape, said in shown
        ).strip()
        + "."
    )


def _of_kinds(facts: Facts, agent: Agent, kinds: frozenset[str]) -> dict[str, Change]:
    if facts.baseline is not None:
        return changes(facts.baseline, agent, kinds)[0]
    nothing = Estimate(value=None, low=None, high=None, questions=0)
    inside = agent.of_kind(kinds)
    return {
        name: Change(before=nothing, after=agent.estimate(name, inside), difference=nothing) for name in agent.columns
    }


def _kind_item(name: str, count: int, found: dict[str, Change]) -> str:
    ranges = []
    for metric, heading in (("tool_rate", "Called a tool"), ("accuracy", "Right")):
        it = found[metric]
        words = share(it.after.value)
        if it.before.value is not None:
            words = f"{share(it.before.value).removesuffix('%')} → {words}"
        ranges.append(
            f'<div class="measure"><span class="of">{heading}</span>{range_chart(heading, it.before, it.after)}'
            f'<span class="words">{words}</span></div>'
        )
    return f"<li><h3>{html(name)}<small>{plural(count, 'question')}</small></h3>{''.join(ranges)}</li>"


def by_tool(facts: Facts) -> str:
    """Each tool: calls before and after, what they took, how many failed, and how many were on known questions."""
    uses = facts.after.table.tool_use
    earlier = facts.before.table.tool_use if facts.before else {}
    if not (uses or earlier):
        return "<p>No tool was called.</p>"
    names = sorted(
        set(uses) | set(earlier), key=lambda name: (-_use(earlier, name).calls - _use(uses, name).calls, name)
    )
    rows = []
    for name in names[:MANY]:
        use, was = _use(uses, name), _use(earlier, name)
        calls = f"{was.calls:,} → <b>{use.calls:,}</b>" if facts.before else f"<b>{use.calls:,}</b>"
        failed = use.statuses["error"] + use.statuses["timeout"]
        held = use.statuses["blocked"] + use.statuses["repeated"]
        rows.append([
            html(name), calls, f"{facts.after.redundant_by_tool.get(name, 0):,}" if _probed(facts) else "not known",
            amount(use.seconds / use.calls if use.calls else None), amount(use.cost),
            f"{failed:,} ({share(failed / use.calls)})" if use.calls else "0", f"{held:,}",
        ])  # fmt: skip
    head = [
        "Tool",
        "Calls executed",
        "Runs on known questions",
        "Seconds a call",
        "Cost",
        "Failed",
        "Blocked or repeated",
    ]
    more = (
        f"<p>{len(names) - MANY:,} more tools are in the figures that --json writes.</p>" if len(names) > MANY else ""
    )
    return table("Figures by tool", head, rows) + more


def _use(uses: dict[str, ToolUse], name: str) -> ToolUse:
    return uses.get(name) or ToolUse()


def _probed(facts: Facts) -> bool:
    """There are forced-direct runs, so that it is known what was known."""
    return bool((facts.after.table.column("branch") == 1).any())


def branches(facts: Facts) -> str:
    """What the model does freely, forced to answer, and forced to call."""
    said = {"free": "Free", "direct": "Forced to answer directly", "tool": "Forced to call a tool"}
    rows = []
    for kept in facts.kept:
        found = branch_figures(kept.table)
        if set(found) <= {"free"}:
            continue
        for branch, row in found.items():
            named = f"{said[branch]}, <code>{html(kept.url)}</code>" if facts.before else said[branch]
            rows.append([named, f"{row['accuracy'].questions:,}", *(cell(name, row[name]) for name in row)])
    if not rows:
        return ""
    head = ["Runs", "Judged questions", *(HEADINGS[name] for name in ("accuracy", "calls", "seconds", "cost"))]
    return (
        "<details><summary>Free and forced runs, side by side</summary>"
        f"{table('Figures by branch', head, rows)}</details>"
    )


def shadow(facts: Facts) -> str:
    """What a gate that only watched would have saved."""
    if facts.shadow is None:
        return ""
    it = facts.shadow
    spared = f"{it.calls_saved:,} of {it.calls:,} tool calls would not have run"
    rows = [
        [html(name), f"{tool.calls:,}", f"{tool.calls_saved:,}", amount(tool.seconds_saved), amount(tool.cost_saved)]
        for name, tool in sorted(it.per_tool.items())
    ]
    return (
        '<section id="shadow"><h2>What the watching gate would have saved</h2>'
        f"<p><b>{spared}</b>, which took {amount(it.seconds_saved)} seconds and cost {amount(it.cost_saved)}. It "
        f"watched {plural(it.turns, 'turn')}, would have answered {it.direct_turns:,} of them without any tool, and "
        f"failed at {plural(it.failures, 'decision')}. What the answers would have been is not known from shadow runs; "
        "<code>metis evaluate gate</code> on recorded branches says that.</p>"
        + table("Saved by tool", ["Tool", "Calls", "Saved", "Seconds saved", "Cost saved"], rows)
        + "</section>"
    )


_UNMEASURED = (
    '<p class="none">Not measured. Give <code>--evaluation FILE</code>, written by '
    "<code>metis evaluate gate --json</code>"
)
_NO_HISTORY = (
    '<p class="none">Not given: <code>--history FILE</code>, such as <code>metrics.json</code> of '
    "<code>metis demo</code>.</p>"
)


def frontier(facts: Facts) -> str:
    """Accuracy against tool use: the gate's frontier with its threshold, or where the measured agents stand."""
    gate = facts.gate
    if gate is not None and gate.figures is not None:
        return _gate_frontier(gate, gate.figures)
    series = _agents(facts)
    if len(series) < 2:
        return f"{_UNMEASURED}.</p>"
    rows = [[html(one.name), share(one.marks[0].at[0]), share(one.marks[0].at[1])] for one in series]
    note = "" if gate is None else f"<p>The gate <code>{html(gate.name)}</code> {_threshold(gate)}</p>"
    return note + _figure("Accuracy and tool use of the agents measured", series, rows, ["", "Tool rate", "Accuracy"])


def _threshold(gate: Gate) -> str:
    at = "has no threshold" if gate.threshold is None else f"calls a tool above {gate.threshold:.3f}"
    return f"{at} (chosen so: {html(gate.chosen, 500)})." if gate.chosen else f"{at}."


def _gate_frontier(gate: Gate, figures: GateFigures) -> str:
    at = figures.at_threshold
    line = [(point.tool_rate, point.accuracy) for point in sorted(figures.frontier, key=lambda point: point.tool_rate)]
    series = [Series(name="the gate at every threshold", tone=0, line=line)]
    series.append(Series(name=f"at its threshold, {at.threshold:.3f}", tone=2, marks=[_threshold_mark(at)]))
    flat = {name: row.get("accuracy") for name, row in figures.baselines.items()}
    ends = [Mark(at=(rate, float(value))) for rate, name in ((0.0, "never"), (1.0, "always"))
            if isinstance(value := flat.get(name), int | float)]  # fmt: skip
    if ends:
        series.append(Series(name="never and always calling", tone=1, line=[m.at for m in ends], marks=ends))
    rows = [["At the threshold", share(at.tool_rate), share(at.accuracy)]]
    rows += [[html(name), "", share(float(value))] for name, value in flat.items() if isinstance(value, int | float)]
    rows += [["Frontier", share(x), share(y)] for x, y in line]
    return (
        f"<p>The gate <code>{html(gate.name)}</code> {_threshold(gate)}</p>"
        f"<p>{_at_threshold(at)} Measured on {html(gate.measured)}.</p>"
        + _figure("Accuracy of the gate at every tool rate", series, rows, ["", "Tool rate", "Accuracy"])
    )


def _threshold_mark(at: AtThreshold) -> Mark:
    def pair(interval: tuple[float | None, float | None] | None) -> tuple[float, float] | None:
        if interval is None or interval[0] is None or interval[1] is None:
            return None
        return interval[0], interval[1]

    return Mark(at=(at.tool_rate, at.accuracy), across=pair(at.tool_rate_interval), along=pair(at.accuracy_interval))


def _at_threshold(at: AtThreshold) -> str:
    known = {name: at.share(name) for name in ("redundant", "harmful", "necessary", "missed")}
    said = [f"{name} {share(value)}" for name, value in known.items() if value is not None]
    parts = f" Of all questions: {', '.join(said)}." if said else ""
    return (
        f"There it calls a tool on {share(at.tool_rate)} of the questions and is right on {share(at.accuracy)}.{parts}"
    )


def _agents(facts: Facts) -> list[Series]:
    """Where each agent and each forced branch stands."""
    after = facts.after
    found = [("after", 0, after.agent), ("before", 1, facts.before.agent if facts.before else None)]
    found += [("always calling (forced)", 3, agent_of(after.table, "tool")),
              ("never calling (forced)", 4, agent_of(after.table, "direct"))]  # fmt: skip
    series = []
    for name, tone, agent in found:
        if agent is None:
            continue
        rate, right = agent.estimate("tool_rate"), agent.estimate("accuracy")
        if rate.value is not None and right.value is not None:
            mark = Mark(at=(rate.value, right.value), across=_edges(rate), along=_edges(right))
            series.append(Series(name=name, tone=tone, marks=[mark]))
    return series


def _edges(estimate: Estimate) -> tuple[float, float] | None:
    return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


def _figure(title: str, series: Sequence[Series], rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    heights = [y for one in series for _, y in one.line]
    heights += [y for one in series for mark in one.marks for y in (mark.at[1], *(mark.along or ()))]
    low, high = min(heights), max(heights)
    room = max(0.04, 0.08 * (high - low))
    y = Axis(label="accuracy", low=max(0.0, low - room), high=min(1.0, high + room))
    x = Axis(label="questions on which a tool is called")
    return _drawn(title, "Accuracy (upwards)", chart(title, x, y, series), series, table(title, head, rows))


def _drawn(title: str, said: str, svg: str, series: Sequence[Series], figures: str) -> str:
    return (
        f"<figure><figcaption>{said}</figcaption>{svg}{legend(series)}</figure>"
        f"<details><summary>Figures as a table</summary>{figures}</details>"
    )


def calibration(facts: Facts) -> str:
    """Of the questions to which the gate gave a probability, how many were right."""
    figures = facts.gate.figures if facts.gate else None
    if figures is None or not figures.calibration:
        return (
            _UNMEASURED
            + (" of this version: the one given has no calibration in it" if figures else "") + ".</p>"
        )  # fmt: skip
    marks = [
        Mark(at=(one.predicted, one.observed), along=wilson(one.observed, one.questions)) for one in figures.calibration
    ]
    title = "Calibration: predicted and observed share of right direct answers"
    series = [
        Series(name="perfect calibration", tone=9, line=[(0.0, 0.0), (1.0, 1.0)]),
        Series(name="questions in ten equal bins, with 95% intervals", tone=0, marks=marks),
    ]
    rows = [[f"{one.predicted:.3f}", f"{one.observed:.3f}", f"{one.questions:,.0f}"] for one in figures.calibration]
    quality = [f"{name} {value:.3f}" for name, value in (("Expected calibration error", figures.ece),
               ("Brier score", figures.brier), ("AUC", figures.auc)) if value is not None]  # fmt: skip
    x = Axis(label="probability that the direct answer is right, as the gate says")
    return f"<p>{', '.join(quality)}.</p>" + _drawn(
        title, "Direct answers that were right (upwards)", chart(title, x, Axis(label="right"), series), series,
        table(title, ["Predicted", "Observed", "Questions"], rows),
    )  # fmt: skip


def training(facts: Facts) -> str:
    """The training curve: what became of accuracy and of calls, step by step."""
    if facts.history is None:
        return _NO_HISTORY
    tones = dict(zip(CURVES, (0, 1, 5, 6, 7), strict=True))
    series = [
        Series(name=said, tone=tones[name], line=[(e["step"], e[name]) for e in facts.history if name in e])
        for name, said in CURVES.items()
        if any(name in entry for entry in facts.history)
    ]
    steps = [entry["step"] for entry in facts.history]
    first, last = min(steps), max(steps)
    x = Axis(label="training step", low=first, high=max(last, first + 1), word=lambda step: f"{step:.0f}")
    title = f"Training curve, steps {first:.0f} to {last:.0f}"
    shown = facts.history if len(facts.history) <= 100 else facts.history[:: len(facts.history) // 100 + 1]
    rows = [[f"{e['step']:.0f}", *(f"{e[name]:.3f}" if name in e else "–" for name in CURVES)] for e in shown]
    return _drawn(
        title, "Share of the step's free rollouts (rho: of all)", chart(title, x, Axis(label="share"), series), series,
        table(title, ["Step", *CURVES.values()], rows),
    )  # fmt: skip
