"""Text that others wrote, made fit to be looked at: nothing invisible, nothing endless.

Questions, answers and tool output may be hostile. Escaping for HTML is the page's own business (`html.escape` here,
`textContent` in the browser); this sees to what escaping leaves: terminal codes, characters that turn the reading
direction or can't be seen, halves of characters, and fields of many megabytes. All of it stays recognisable: a
reader of the report should see that an answer holds a zero-width space.
"""

from __future__ import annotations

import re

__all__ = ["clipped", "visible"]

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
