"""The audit in words: the headline and what stands under it, for the page and, in short, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from metis_agent.audit.frontier import RulePoint
from metis_agent.audit.kinds import Row
from metis_agent.audit.run import Findings, Frontier
from metis_agent.evaluation.agents import Estimate
from metis_agent.report.document import plural, visible

__all__ = ["duration", "frontier_words", "headline", "money", "remarks", "show", "took"]

_SHOWN = 8


def headline(findings: Findings) -> str:
    """The finding in a sentence or two."""
    figures = findings.figures
    if figures.redundant.value is None:
        return (
            f"{plural(figures.calls, 'tool call')} in {plural(figures.turns, 'turn')}, none of which could be judged."
        )
    if figures.doubtful:
        low, high = figures.bounds
        undecided = f"{figures.undecided:,} of {plural(figures.sampled + figures.undecided, 'audited turn')}"
        return (
            f"Of {plural(figures.calls, 'tool call')} in {plural(figures.turns, 'turn')}, between {low:.0%} and "
            f"{high:.0%} changed nothing: {undecided} have no verdict."
        )
    price = took(findings)
    return (
        f"Of {plural(figures.calls, 'tool call')} in {plural(figures.turns, 'turn')}, {percent(figures.redundant)} "
        "changed "
        f"nothing{f'; they {price}' if price else ''}."
    )


def took(findings: Findings) -> str:
    """What the redundant calls cost: "cost $41 and 52 minutes"."""
    figures = findings.figures
    parts = []
    if figures.dollars.value:
        more = " and more, some prices being unknown" if figures.unpriced > 0.005 else ""
        parts.append(f"{money(figures.dollars.value)}{more}")
    elif figures.tokens.value:
        parts.append(f"{count(figures.tokens.value)} tokens of unknown price")
    if figures.seconds.value:
        parts.append(duration(figures.seconds.value))
    return f"cost {' and '.join(parts)}" if parts else ""


def frontier_words(frontier: Frontier, *, changed: str) -> list[tuple[str, str]]:
    """What each rule would have kept of the calls, and how well turns would then have ended."""
    found = [("Nobody could save more", frontier.oracle)]
    cap = frontier.best_cap
    if cap.setting is not None:
        found.append((f"At most {plural(round(cap.setting), 'round')} of calls a turn", cap))
    if frontier.self_report is not None:
        found.append(("Asking the model whether it is done", frontier.self_report))
    if frontier.best_gate is not None:
        found.append(("A gate trained on these runs, cross-fitted", frontier.best_gate))
    return [(name, _rule(point, frontier.full, changed)) for name, point in found]


def remarks(findings: Findings) -> list[str]:
    """What a reader has to know to believe the figures."""
    figures, verdicts, counts = findings.figures, findings.verdicts, findings.counts
    said = []
    if acting := findings.survey.calls["acts"]:
        said.append(f"{plural(acting, 'call')} of tools that act are not counted: their effect is their purpose.")
    if unknown := findings.survey.calls["unknown"]:
        tools = ", ".join(visible(tool) for tool in findings.survey.undeclared[:6])
        said.append(f"{plural(unknown, 'call')} of tools of which nobody said what they do are not counted: {tools}.")
    if refused := counts.get("refused", 0):
        said.append(
            f"{plural(refused, 'probe')} gave neither an answer nor an acting call. They count as a wrong place to "
            "stop, so "
            "the share may be higher; an instruction, such as 'Answer now.', may help."
        )
    if figures.undecided:
        why = ", ".join(f"{n:,} {reason}" for reason, n in verdicts.missing.most_common(4))
        said.append(f"{plural(figures.undecided, 'turn')} lack a verdict and are left out ({why}).")
    if over := counts.get("over budget", 0):
        said.append(f"The budget was spent before {plural(over, 'probe')}: run it again with more to go on.")
    said += [f"{plural(n, 'sampled turn')} left out: {reason}." for reason, n in findings.left_out.items()]
    said += list(_judge_words(findings))
    if figures.guessed > 0.005:
        said.append(f"{figures.guessed:.0%} of the tokens were not recorded, and are guessed from the length of texts.")
    if figures.unpriced > 0.005:
        said.append(
            f"{figures.unpriced:.0%} of the tokens are of models whose price is unknown, and are in no sum of money."
        )
    return said


def _judge_words(findings: Findings) -> Iterator[str]:
    swaps, figures = findings.verdicts.swaps, findings.figures
    asked = swaps[True] + swaps[False]
    if asked:
        yield (
            f"The judge, {visible(findings.judge)}, ruled on {plural(asked, 'pair')} of answers in both orders and "
            "agreed "
            f"with itself on {swaps[True] / asked:.0%}; the others count as not the same."
        )
    if findings.verdicts.steered:
        yield f"{plural(findings.verdicts.steered, 'answer')} tried to steer the judge, and count as not the same."
    if figures.checked:
        yield (
            f"A person checked {plural(figures.checked, 'turn')}: the judge was wrong on {figures.judge_wrong} of "
            f"{figures.checked_pairs}. The share is corrected by that; the judge alone said {percent(figures.judged)}."
        )
    elif asked:
        yield "Nobody has checked the judge: metis audit --check 30 writes a page for it, and corrects the share."


def show(console: Console, findings: Findings) -> None:
    """The audit in a terminal."""
    console.print(Text(headline(findings), style="bold"), soft_wrap=True)
    figures = findings.figures
    for name, rows in (("tool", figures.by_tool), ("round", figures.by_position), ("kind", figures.by_kind)):
        if len(rows) > 1 or name == "tool":
            console.print(_table(name, rows))
    if findings.frontier is not None:
        for name, words in frontier_words(findings.frontier, changed=outcome_word(findings)):
            console.print(Text(f"{name}: {words}."), soft_wrap=True)
    for remark in remarks(findings):
        console.print(Text(remark, style="dim"), soft_wrap=True)


def outcome_word(findings: Findings) -> str:
    """What a turn that does not end as well means here."""
    return (
        "of answers right" if set(findings.verdicts.sources) <= {"reference", "acting call"} else "of answers the same"
    )


def _table(name: str, rows: Sequence[Row]) -> Table:
    table = Table(title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in (name, "calls", "changed nothing", "needed", "in vain", "harmful", "cost"):
        table.add_column(heading, justify="left" if heading == name else "right")
    for row in rows[:_SHOWN]:
        table.add_row(
            Text(visible(row.name) or "no kind"), f"{row.calls:,}", percent(row.redundant), share(row.necessary),
            share(row.lost), share(row.harmful), money(row.dollars) if row.dollars else "–",
        )  # fmt: skip
    if len(rows) > _SHOWN:
        table.add_row(f"and {len(rows) - _SHOWN} more", "", "", "", "", "", "")
    return table


def _rule(point: RulePoint, full: RulePoint, changed: str) -> str:
    saved = 1 - (point.calls.value or 0.0)
    return f"{saved:.0%} of the calls saved, {share(point.right)} {changed} (as it was: {share(full.right)})"


def percent(estimate: Estimate) -> str:
    """A share with its interval: "61% [57, 65]"."""
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "not known"
    interval = f"[{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
    return f"{100 * estimate.value:.0f}% {interval}".replace(" ", "\N{NO-BREAK SPACE}")


def share(estimate: Estimate) -> str:
    """A share alone."""
    return "–" if estimate.value is None else f"{100 * estimate.value:.0f}%"


def money(dollars: float) -> str:
    """Dollars to two or three digits."""
    if dollars >= 10:
        return f"${dollars:,.0f}"
    return f"${dollars:.2f}" if dollars >= 0.1 or dollars == 0 else f"${dollars:.2g}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((86_400.0, "day"), (3_600.0, "hour"), (60.0, "minute")):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:,.0f} {unit}s" if number >= 10 else f"{number:.1f} {unit}s".replace(".0 ", " ")
    return f"{seconds:.0f} seconds" if seconds >= 2 else f"{seconds:.2g} seconds"


def count(number: float) -> str:
    """A large number to three digits."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"
