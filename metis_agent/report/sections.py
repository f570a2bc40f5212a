"""The parts of the page below its top, each with a chart, words, and the figures as a table.

A part for which nothing is known says which option brings it: a reader should not wonder what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from metis_agent.hdpo.evaluation import Estimate
from metis_agent.hdpo.report.charts import range_chart
from metis_agent.hdpo.report.facts import Facts
from metis_agent.hdpo.report.figures import SHARES, Agent, Change, branch_figures, changes
from metis_agent.hdpo.report.runs import ToolUse
from metis_agent.hdpo.report.words import HEADINGS, amount, cell, html, plural, share

__all__ = ["branches", "by_kind", "by_tool", "shadow", "table"]

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
