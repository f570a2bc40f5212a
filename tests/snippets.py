"""Code blocks of Markdown pages: what runs, what it has to print, and which commands are named."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A block of Python, and the `text` block right after it."""

    code: str
    printed: str
    line: int


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, content, line) of every fenced block."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        indent, language, content = match.groups()
        lines = (line.removeprefix(indent) for line in content.splitlines(keepends=True))
        found.append((language, "".join(lines), text.count("\n", 0, match.start()) + 1))
    return found


def snippets(page: Path) -> list[Snippet]:
    """The blocks marked `python`, which run; those marked `py` need a key or a server, and are only compiled."""
    found = blocks(page)
    after = [*found[1:], ("", "", 0)][: len(found)]
    return [
        Snippet(code=content, printed=next_[1] if next_[0] == "text" else "", line=line)
        for (language, content, line), next_ in zip(found, after, strict=True)
        if language == "python"
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of each `metis ...` line in the `sh` blocks."""
    lines = [line for language, content, _ in blocks(page) if language == "sh" for line in content.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("metis ")]
