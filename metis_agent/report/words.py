"""Numbers as the report says them, in HTML where they come with an interval."""

from __future__ import annotations

from html import escape

from metis_agent.hdpo.evaluation import Estimate
from metis_agent.hdpo.report.figures import SHARES
from metis_agent.hdpo.report.text import clipped

__all__ = ["HEADINGS", "amount", "cell", "change", "change_cell", "html", "interval", "plural", "points", "share"]

HEADINGS = {
    "accuracy": "Accuracy", "tool_rate": "Questions with a tool call", "redundant_rate": "Redundant calls",
    "necessary_recall": "Necessary calls made", "calls": "Calls a question", "seconds": "Seconds a question",
    "tool_seconds": "of these in tools", "cost": "Cost a question",
}  # fmt: skip
MINUS = "\N{MINUS SIGN}"


def html(text: str, limit: int = 200) -> str:
    """Anybody's text, escaped and made visible."""
    return escape(clipped(text, limit))


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 run", "2,000 runs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "–" if value is None else f"{100 * value:.1f}%"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return _signed(f"{100 * value:.1f}")


def amount(value: float | None) -> str:
    """A quantity, to three or four digits."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{size:,.0f}" if size >= 100 else f"{size:.2f}" if size >= 0.1 else f"{size:.2g}"
    return (MINUS if value < 0 and text.strip("0.") else "") + text


def cell(name: str, estimate: Estimate) -> str:
    """A value and, smaller, its interval."""
    if estimate.value is None:
        return '<span class="none">not known</span>'
    word = share if name in SHARES else amount
    low, high = word(estimate.low).removesuffix("%"), word(estimate.high)
    return f'<b>{word(estimate.value)}</b> <span class="interval">{low} to {high}</span>'


def change_cell(name: str, estimate: Estimate) -> str:
    """A difference and, smaller, its interval."""
    if estimate.value is None:
        return '<span class="none">not known</span>'
    return f'<b>{change(name, estimate.value)}</b> <span class="interval">{interval(name, estimate)}</span>'


def change(name: str, value: float) -> str:
    """A difference with its sign and, of shares, its unit."""
    return f"{points(value)} pt" if name in SHARES else _signed(amount(value).replace(MINUS, "-"))


def interval(name: str, estimate: Estimate) -> str:
    """From low to high, signs and all."""
    word = points if name in SHARES else (lambda value: _signed(amount(value).replace(MINUS, "-")))
    return f"{word(estimate.low or 0.0)} to {word(estimate.high or 0.0)}"


def _signed(number: str) -> str:
    if not number.strip("-0.,"):
        return number.lstrip("-")
    return MINUS + number[1:] if number.startswith("-") else "+" + number
