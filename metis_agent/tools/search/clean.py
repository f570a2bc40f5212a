"""Text that strangers wrote, made fit to be shown to a model: visible, short, on one line, without markup.

Used by the search tools for everything they show, and by the web backends for what comes off the network.
"""

from __future__ import annotations

import html
import re
from urllib.parse import urlsplit

__all__ = ["cut", "plain_text", "visible", "web_link"]

# Controls, bidirectional and other invisible characters, half surrogates, and the "tag" characters and
# variation selectors that can smuggle whole sentences. The joiners 200C and 200D stay: Persian, Hindi and
# emoji need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\ufe00-\ufe0e\U000e0000-\U000e0fff]"
)
# A tag has a letter, "/", "!" or "?" right after the bracket, so that "a < b" stays; one that is never closed ends
# at the next, and a comment with the text. Possessive quantifiers make matching linear.
_TAG = re.compile(r"<!--(?:[^-]|-(?!->))*+(?:-->)?|<(/?)([A-Za-z][A-Za-z0-9:-]*+|[/!?])[^<>]*+>?")
_HIDDEN = frozenset({"script", "style", "template", "noscript"})
_MAX_READ = 20_000
_MAX_LINK = 2_000


def visible(text: str, length: int) -> str:
    """Return the text as one line, without what can't be seen; enough of it to be cut to `length`."""
    # A text may be huge: what lies far beyond the cut need not be looked at.
    return " ".join(_UNSEEN.sub("", text[: 8 * length + 1_000]).split())


def cut(text: str, length: int) -> str:
    """Return one visible line of at most `length` characters, cut between words where one ends nearby."""
    line = visible(text, length)
    if len(line) <= length:
        return line
    head = line[: length - 1]
    space = head.rfind(" ", max(0, length - 40))
    return f"{head[:space] if space > 0 else head}…"


def plain_text(value: object, length: int) -> str:
    """Return any value as one visible line of at most `length` characters, its HTML resolved and gone."""
    if value is None:
        return ""
    text = html.unescape(str(value)[:_MAX_READ])
    return cut(_without_tags(text) if "<" in text else text, length)


def web_link(value: object) -> str:
    """Return an http or https address as it is; an empty string for anything else."""
    link = value.strip() if isinstance(value, str) and len(value) <= _MAX_LINK else ""
    if not link.isprintable() or any(character.isspace() or character in "<>\"'`\\" for character in link):
        return ""
    try:
        parts = urlsplit(link)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError:
        return ""
    # A name and password before the host pass it off as another: https://bank.com@evil.com.
    return link if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc else ""


def _without_tags(text: str) -> str:
    kept: list[str] = []
    done, hidden = 0, ""
    for tag in _TAG.finditer(text):
        if not hidden:
            kept += (text[done : tag.start()], " ")
        done = tag.end()
        closing, name = tag[1], (tag[2] or "").lower()
        if hidden:
            hidden = "" if closing and name == hidden else hidden
        elif name in _HIDDEN and not closing:
            hidden = name
    return "".join(kept if hidden else (*kept, text[done:]))
