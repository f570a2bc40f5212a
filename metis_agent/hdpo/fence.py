"""Data that a judge is shown, fenced so that nothing in it can pass for an instruction of ours.

Whoever is judged wrote the data: an answer may say "ignore the rubric", a web page may close a tag and open a
system message. Three things keep it inside. The fence carries a random number that the writer could not
know. The data is JSON, so that a quotation mark or a line break can't end a field. And in that JSON no `<`,
`>`, `|` or invisible character stands as itself: no tag, ours or a chat template's, can be written in it.
"""

from __future__ import annotations

import json
import re
import secrets
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Fenced", "fence", "shorten"]

_UNSAFE = re.compile(r"[<>|\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


@dataclass(frozen=True, kw_only=True)
class Fenced:
    """Data between two markers that it can't contain."""

    opening: str
    closing: str
    text: str
    """Opening, data and closing, on lines of their own."""


def fence(fields: Mapping[str, Any], *, max_chars: int = 4_000) -> Fenced:
    """Fence the fields.

    Args:
        fields: what JSON can hold.
        max_chars: of each text in it; of a longer one head and tail are shown.
    """
    body = json.dumps(_shortened(fields, max_chars), ensure_ascii=False, indent=1)
    body = "".join(map(_escape, body)) if not body.isascii() else _UNSAFE.sub(lambda match: _code(match[0]), body)
    nonce = secrets.token_hex(12)
    while nonce in body:
        nonce = secrets.token_hex(12)
    opening, closing = f"<data-{nonce}>", f"</data-{nonce}>"
    return Fenced(opening=opening, closing=closing, text=f"{opening}\n{body}\n{closing}")


def shorten(text: str, most: int) -> str:
    """Head and tail of a text that is too long, with what was left out counted between."""
    if len(text) <= most:
        return text
    head, tail = most - most // 3, most // 3
    return f"{text[:head]} [... {len(text) - head - tail} characters left out ...] {text[len(text) - tail :]}"


def _shortened(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return shorten(value, most)
    if isinstance(value, Mapping):
        return {shorten(str(key), most): _shortened(inner, most) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(inner, most) for inner in value]
    return value


def _escape(character: str) -> str:
    if _UNSAFE.match(character) or (ord(character) > 127 and unicodedata.category(character) in _HIDDEN):
        return _code(character)
    return character


def _code(character: str) -> str:
    number = ord(character)
    if number <= 0xFFFF:
        return f"\\u{number:04x}"
    number -= 0x10000
    return f"\\u{0xD800 + (number >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}"


_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
