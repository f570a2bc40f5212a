"""The page: everything that is known, in one HTML file that loads nothing.

Last step of the report; see `document` for what such a file may do. The summary stands before the runs in it, so a
browser draws it while the rest still arrives.

What the report's words mean, what was left out of its figures, and which runs it carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

from metis_agent.report import headline, sections
from metis_agent.report.archive import packed
from metis_agent.report.document import packaged, policy, version, write_page
from metis_agent.report.facts import Facts, Progress, ReportInputs, gather
from metis_agent.report.words import clipped, html, plural

__all__ = ["carried", "method", "page_of", "write_report"]

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
        "opening": headline.opening(facts), "verdict": headline.verdict(facts), "cards": headline.cards(facts),
        "measured": headline.before_and_after(facts) + sections.branches(facts), "shadow": sections.shadow(facts),
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
