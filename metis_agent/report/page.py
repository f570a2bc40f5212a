"""The report's page: everything that is known, in one HTML file that loads nothing.

Its top says what was saved, what that cost in accuracy, and before and after in full; its end what the words mean, what
was left out of the figures, and which runs it carries. See `document` for what such a file may do. The summary stands
before the runs in it, so a browser draws it while the rest still arrives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from metis_agent.evaluation.agents import Estimate
from metis_agent.report import sections
from metis_agent.report.document import (
    HEADINGS,
    amount,
    cell,
    change,
    change_cell,
    clipped,
    html,
    interval,
    packaged,
    plural,
    policy,
    share,
    version,
    write_page,
)
from metis_agent.report.facts import Facts, Progress, ReportInputs, gather
from metis_agent.report.figures import AMOUNTS, SHARES, Change
from metis_agent.report.transcript import packed

__all__ = ["before_and_after", "cards", "carried", "method", "opening", "page_of", "verdict", "write_report"]


def opening(facts: Facts) -> str:
    """What the report is about, in a line."""
    agent = facts.after.agent
    said = [plural(len(agent.questions), "question")] if agent else []
    said.append(plural(agent.runs if agent else facts.after.runs, "run" if agent else "forced run"))
    forced = sum(kept.runs - kept.failed - (kept.agent.runs if kept.agent else 0) for kept in facts.kept)
    if agent and forced:
        said.append(f"{plural(forced, 'forced run')} to tell what was needed")
    against = {"before": f", compared with <code>{html(facts.before.url)}</code>" if facts.before else "",
               "always": ", compared with always calling a tool", "nothing": ""}  # fmt: skip
    return f"<code>{html(facts.after.url)}</code>{against[facts.compared]}. {', '.join(said)}."


def verdict(facts: Facts) -> str:
    """The finding in plain words; it claims no more than the intervals do."""
    if facts.after.agent is None:
        return "This store holds forced runs only: what each branch does is below, and nothing that an agent chose."
    if not facts.changes:
        return _alone(facts)
    calls, accuracy = facts.changes["calls"], facts.changes["accuracy"]
    before, after = calls.before.value or 0.0, calls.after.value or 0.0
    if before and _clear(calls.difference):
        less = 1 - after / before
        calling = f"{abs(less):.0%} {'fewer' if less > 0 else 'more'} tool calls"
    else:
        calling = "As many tool calls, as far as can be told"
    same = "on the same questions" if facts.paired else "on other questions"
    return f"{calling} {same}, and {_accuracy(accuracy)}."


def _alone(facts: Facts) -> str:
    agent = facts.after.agent
    if agent is None:
        return ""
    calls, right = agent.estimate("calls"), agent.estimate("accuracy")
    known = f"{share(right.value)} of answers right" if right.value is not None else "no answers that could be judged"
    return f"{amount(calls.value)} tool calls a question, {known}. With <code>--before</code> it says what was saved."


def _accuracy(accuracy: Change) -> str:
    if accuracy.difference.value is None:
        return "what became of accuracy is not known: these questions have no reference answers"
    size = f"{abs(100 * accuracy.difference.value):.1f} points"
    if not _clear(accuracy.difference):
        return f"accuracy unchanged as far as can be told ({interval('accuracy', accuracy.difference)} points)"
    return f"accuracy {'up' if accuracy.difference.value > 0 else 'down'} by {size}"


def _clear(difference: Estimate) -> bool:
    """Its interval does not hold zero."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and (low > 0 or high < 0)


def cards(facts: Facts) -> str:
    """Calls, seconds, cost, accuracy: the change large, what it was and is below."""
    if not facts.changes:
        return ""
    names = {"calls": "Tool calls", "seconds": "Time", "cost": "Tool cost", "accuracy": "Accuracy"}
    return f'<ul class="cards">{"".join(_card(facts, name, title) for name, title in names.items())}</ul>'


def _card(facts: Facts, name: str, title: str) -> str:
    it = facts.changes[name]
    if it.before.value is None or it.after.value is None or it.difference.value is None:
        return f'<li><h3>{title}</h3><p class="large none">not known</p><p>No reference answers.</p></li>'
    unit = "" if name == "accuracy" else " a question"
    word = share if name in SHARES else amount
    large, extra = change(name, it.difference.value), ""
    if name != "accuracy":
        large = (
            f"{it.after.value / it.before.value - 1:+.0%}".replace("-", "\N{MINUS SIGN}") if it.before.value else "0"
        )
        extra = f"<p>{_per_thousand(name, it.difference.value)}</p>"
        if name == "seconds":
            extra += _busy(facts)
    if name == "cost" and not it.before.value and not it.after.value:
        return (
            f'<li><h3>{title}</h3><p class="large none">none declared</p><p>No tool of these runs has a cost.</p></li>'
        )
    return (
        f'<li><h3>{title}</h3><p class="large">{large}</p><p>{word(it.before.value)} → {word(it.after.value)}{unit}</p>'
        f'<p class="interval">{interval(name, it.difference)}{unit}</p>{extra}</li>'
    )


def _per_thousand(name: str, difference: float) -> str:
    noun = {"calls": "calls", "seconds": "seconds", "cost": "of cost"}[name]
    saved = "saved" if difference < 0 else "more"
    return f"{amount(abs(1000 * difference))} {noun} {saved} per 1,000 questions"


def _busy(facts: Facts) -> str:
    """Where runs shared a machine, their own seconds hold much waiting for each other: say what all took together."""
    before, after = facts.baseline, facts.after.agent
    if before is None or after is None:
        return ""
    took = float(after.columns["seconds"].sum())
    if took < 1.5 * after.busy:
        return ""
    by_clock = [agent.busy / max(1, len(agent.questions)) for agent in (before, after)]
    return f"<p>Many ran at once; by the clock {amount(by_clock[0])} → {amount(by_clock[1])} a question</p>"


def before_and_after(facts: Facts) -> str:
    """The table of everything measured, with intervals."""
    agent = facts.after.agent
    if agent is None:
        return ""
    if not facts.changes:
        rows = [f"<tr><th scope=row>{HEADINGS[name]}</th><td>{cell(name, agent.estimate(name))}</td></tr>"
                for name in SHARES + AMOUNTS]  # fmt: skip
        head = "<td></td><th scope=col>Measured</th>"
    else:
        rows = [
            f"<tr><th scope=row>{HEADINGS[name]}</th><td>{cell(name, it.before)}</td><td>{cell(name, it.after)}</td>"
            f"<td>{change_cell(name, it.difference)}</td></tr>"
            for name, it in facts.changes.items()
        ]
        was = "Always calling" if facts.compared == "always" else "Before"
        head = f"<td></td><th scope=col>{was}</th><th scope=col>After</th><th scope=col>Change</th>"
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


_SLOT = re.compile(r"\{\{(\w+)\}\}")


def write_report(
    inputs: ReportInputs, out: Path, *, title: str = "Metis report", progress: Progress = lambda _, runs, __: runs
) -> Facts:
    """Read what the inputs name and write the page; whole or not at all.

    Raises:
        StorageError: a store can't be read, or the page can't be written.
        InputError: see `facts.gather`.
    """
    facts = gather(inputs, progress)
    write_page(out, page_of(facts, title))
    return facts


def page_of(facts: Facts, title: str) -> Iterator[str]:
    """The page, piece by piece."""
    style, script = packaged("page.css"), packaged("page.js")
    pieces = {
        "policy": policy(style, script), "style": style, "script": script, "title": escape(clipped(title, 200)),
        "opening": opening(facts), "verdict": verdict(facts), "cards": cards(facts),
        "measured": before_and_after(facts) + sections.branches(facts), "shadow": sections.shadow(facts),
        "frontier": sections.frontier(facts), "kinds": sections.by_kind(facts), "tools": sections.by_tool(facts),
        "training": sections.training(facts), "calibration": sections.calibration(facts),
        "carried": carried(facts), "method": method(facts), "version": version(),
    }  # fmt: skip
    # Split once, and only the template: what is put in is never looked at for slots.
    for place, piece in enumerate(_SLOT.split(packaged("page.html"))):
        if place % 2 == 0:
            yield piece
        elif piece == "archive":
            yield from _archive(facts)
        else:
            yield pieces[piece]


def _archive(facts: Facts) -> Iterator[str]:
    index = facts.archive.index()
    index["stores"] = ["after", "before"][: len(facts.kept)]
    yield f'<script type="application/octet-stream" id="index">{packed(json.dumps(index))}</script>\n'
    for block in facts.archive.blocks:
        yield f'<script type="application/octet-stream" data-block>{block}</script>\n'
    for number, picture in enumerate(facts.archive.pictures.embedded):
        yield f'<script type="application/octet-stream" data-picture="{number}">{picture}</script>\n'


def method(facts: Facts) -> str:
    """Definitions, and what was left out."""
    pictures = facts.archive.pictures.left_out
    unseen = f" {plural(pictures, 'image')} not shown, each with the reason." if pictures else ""
    meanings = {
        "Known": "A question that the model answers rightly in all of its runs forced to answer directly.",
        "Redundant call": "A tool called on a known question. The rate is a share of known questions.",
        "Necessary call": "A tool called where no forced direct answer is right and at least half of the forced tool "
        "runs are. The rate is a share of such questions.",
        "Intervals": "95%, by bootstrap over questions; each question counts once however often it ran. "
        + _pairing(facts),
        "Left out of the figures": f"<ul>{_left_out(facts)}</ul>",
        "Runs to look at": carried(facts) + unseen,
    }
    return f"<dl>{''.join(f'<dt>{word}</dt><dd>{meaning}</dd>' for word, meaning in meanings.items())}</dl>"


def _left_out(facts: Facts) -> str:
    items = []
    for kept in facts.kept:
        parts = [plural(kept.failed, "failed run")] if kept.failed else []
        parts += [f"{count:,} unjudged ({html(reason)})" for reason, count in kept.table.unjudged.most_common()]
        parts += [plural(kept.bad_lines, "unreadable line")] if kept.bad_lines else []
        items.append(f"<li><code>{html(kept.url)}</code>: {', '.join(parts) if parts else 'nothing'}.</li>")
    return "".join(items)


def _pairing(facts: Facts) -> str:
    if not facts.changes:
        return ""
    if facts.paired:
        count = facts.changes["calls"].difference.questions
        return f"Changes are of the {count:,} questions in both, question by question."
    return "The two stores share no question: changes compare different questions, and are to be read with care."


def carried(facts: Facts) -> str:
    """Which runs the page holds, so that nobody takes a sample for the whole."""
    shown, held = len(facts.archive), sum(kept.runs for kept in facts.kept)
    if shown == held:
        return f"This page carries all {held:,} runs."
    return (
        f"This page carries {shown:,} of {held:,} runs: of each group (by store, by how the run began, by what became "
        "of it) the same number, drawn at random, and small groups whole. All figures are of all runs. "
        "<code>--decisions</code> sets how many it carries."
    )
