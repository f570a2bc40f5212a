"""Numbers as the report says them, in HTML where they come with an interval.

Text that others wrote, made fit to be looked at: nothing invisible, nothing endless.

Questions, answers and tool output may be hostile. Escaping for HTML is the page's own business (`html.escape` here,
`textContent` in the browser); this sees to what escaping leaves: terminal codes, characters that turn the reading
direction or can't be seen, halves of characters, and fields of many megabytes. All of it stays recognisable: a
reader of the report should see that an answer holds a zero-width space.
"""

from __future__ import annotations

import re
from html import escape

from metis_agent.evaluation.agents import Estimate
from metis_agent.report.figures import SHARES

__all__ = [
    "HEADINGS",
    "amount",
    "cell",
    "change",
    "change_cell",
    "clipped",
    "html",
    "interval",
    "plural",
    "points",
    "share",
    "visible",
]

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


_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
# Not the two joiners, U+200C and U+200D: emoji, Persian and Hindi are written with them.
_HIDDEN = re.compile(
    "[\x80-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)
_HALVES = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with what can't be seen, or would move other text, shown by a picture or its code.

    Example:
        >>> visible("\x1b[31mred\u202e")
        '␛[31mred⟨U+202E⟩'
    """
    text = text.replace("\r\n", "\n").translate(_PICTURES)
    return _HALVES.sub("\ufffd", _HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text))


def clipped(text: str, limit: int) -> str:
    """`visible`, and of a longer text its beginning, its end and how much is missing between them."""
    if len(text) <= limit:
        return visible(text)
    head, tail = limit - limit // 5, limit // 5
    missing = len(text) - head - tail
    return f"{visible(text[:head])}\n… {missing:,} characters are left out of this report …\n{visible(text[-tail:])}"
