"""What every page of ours is made of: one HTML file that loads nothing, and can't, written whole or not at all.

Its policy (`Content-Security-Policy`) allows just its own style and script, by their hashes, and images from `data:`:
what a record holds can't run, and can't reach out. Shared by the report and the audit, as are the words and numbers.

Questions, answers and tool output may be hostile. Escaping for HTML is the page's own business (`html.escape` here,
`textContent` in the browser); `clipped` sees to what escaping leaves: terminal codes, characters that turn the reading
direction or can't be seen, halves of characters, and fields of many megabytes. All of it stays recognisable: a
reader of the report should see that an answer holds a zero-width space.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path

from metis_agent.errors import StorageError
from metis_agent.evaluation.agents import Estimate
from metis_agent.formats import atomic_path
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
    "packaged",
    "page_head",
    "plural",
    "points",
    "policy",
    "share",
    "version",
    "visible",
    "write_page",
]


def packaged(name: str, package: str = "metis_agent.report") -> str:
    """The text of a file that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def policy(style: str, script: str = "") -> str:
    """What a page with this style and this script may do."""
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; {scripts}img-src data:; base-uri 'none'; form-action 'none'"
    )


def page_head(title: str, style: str, script: str = "") -> str:
    """A page up to its body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(clipped(title, 200))}</title>\n<style>{style}</style>\n</head>\n"
    )


def write_page(out: Path, pieces: Iterable[str]) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: it can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
    except OSError as error:
        raise StorageError(f"{str(out)!r} can't be written: {error}. Give another --out.") from error


def version() -> str:
    """Of this library; "" where it runs from a folder."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("langgraph-metis")
    except PackageNotFoundError:
        return ""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


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
