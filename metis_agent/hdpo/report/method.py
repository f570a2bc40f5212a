"""What the report's words mean, what was left out of its figures, and which runs it carries."""

from __future__ import annotations

from metis_agent.hdpo.report.facts import Facts
from metis_agent.hdpo.report.words import html, plural

__all__ = ["carried", "method"]


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
