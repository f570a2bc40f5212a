"""Which option does an answer choose? For benchmarks with options A, B, C, ..."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from metis_agent.hdpo.verifiers import choice, normalise
from metis_agent.types import Question

__all__ = ["chosen_letter", "item_id", "listed"]


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer commits to.

    Args:
        answer: The model's own final message.
        options: Their texts by letter.

    Returns:
        `None` where it names no letter, leaves another open, or names one that is not there. An answer that is the
        text of one option, and of no other, chooses that.
    """
    named = [letter for letter in options if choice(Question(id="", text="", answer=letter), answer)]
    if named:
        return named[0]
    said = normalise(answer)
    same = [letter for letter, text in options.items() if said and normalise(text) == said]
    return same[0] if len(same) == 1 else None


def listed(options: Mapping[str, str]) -> str:
    """The options, one a line."""
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def item_id(benchmark: str, row: int, text: str, answer: str) -> str:
    """Names a question by its place and by what it asks: another edition of a data set has other names."""
    digest = hashlib.sha256(f"{text}\x00{answer}".encode("utf-8", "replace")).hexdigest()
    return f"{benchmark}/{row:05d}-{digest[:8]}"
