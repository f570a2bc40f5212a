"""Words of others in Markdown: what a tool's description says must not become a heading, a link or a table's end."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

__all__ = ["inert", "number", "table"]

_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&@:=-])")
_LONGEST = 500


def inert(text: object, longest: int = _LONGEST) -> str:
    """The text on one line, every character that Markdown or HTML gives a meaning escaped, cut to size."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    cut = line if len(line) <= longest else line[: longest - 1] + "…"
    return _MEANS_SOMETHING.sub(r"\\\1", cut)


def number(value: object, interval: object = None) -> str:
    """A figure with its interval; empty for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    if isinstance(interval, Sequence) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval):
        shown += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return shown


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
