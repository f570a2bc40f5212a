"""`prose`: does a sentence, or a few, commit to the reference answer? For agents that answer as people do.

Beside `short_answers`, whose rules want an answer that is nothing but the answer. "There are 259 of part-7 in stock."
is right where 259 is expected, "It could be Paris or Rome." is not where Paris is: what is looked for is a commitment,
not an occurrence. Where in doubt the answer is wrong, so that no policy learns to list candidates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from metis_agent.judging.short_answers import choice, is_number, normalise, number_committed_to
from metis_agent.types import Question

__all__ = ["ALIASES", "prose"]

ALIASES = "aliases"
"""Key of `Question.metadata` with other ways to write the reference answer."""

_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
# Both are looked for in normalised text, which has no apostrophes.
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|no longer|rather than|instead of|(?:is|was|are|were|do|does|did|ca|could|wo)nt)\b"
)
_HEDGED = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|alternatively|could be|might be|may be|not sure|dont know|unsure|guess)\b"
)
_REFUTED = re.compile(r"\s*(?:is|was|are|were) (?:not|wrong|incorrect)\b")
_YEAR = re.compile(r"(?:19|20)\d\d")
_ASIDES = re.compile(
    r"\[\d+(?:\s*,\s*\d+)*\]"  # the number of a source
    r"|\((?:source|see|as of|ref)[^)]*\)"
    r"|\b(?:as of|since|updated|dated|in|on|by)\s+(?:the\s+)?(?:\d{1,2}(?:st|nd|rd|th)?\s+)?"
    r"(?:(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?\s+)?(?:\d{1,2},?\s+)?(?:19|20)\d\d\b",
    re.I,
)
_YES = frozenset({"yes", "true", "correct", "right"})
_NO = frozenset({"no", "false", "incorrect", "wrong"})


def prose(question: Question, answer: str) -> bool | None:
    """Right if the answer commits to the reference, or to one of its aliases, in whatever words.

    - The reference is a letter: as `choice`.
    - A number: the last number of the answer counts, as in `numeric`; numbers of the question ("part-7"), dates and
      numbers of sources are context, unless no other is there. `Question.metadata["tolerance"]` widens what is right.
    - Yes or no, true or false: the answer's first or last word.
    - Text: it stands in a sentence of the answer as whole words, and that sentence neither denies it nor offers an
      alternative.

    Returns:
        `None` without a reference.
    """
    references = [text for text in (question.answer, *_aliases(question)) if text and text.strip()]
    if not references:
        return None
    return any(_commits(question, reference, answer) for reference in references)


def _aliases(question: Question) -> Sequence[str]:
    aliases = question.metadata.get(ALIASES) or ()
    return [aliases] if isinstance(aliases, str) else [str(alias) for alias in aliases]


def _commits(question: Question, reference: str, answer: str) -> bool:
    plain = normalise(reference)
    if plain and normalise(answer) == plain:
        return True
    if re.fullmatch(r"\(?[A-Z]\)?\.?", reference.strip()):
        return bool(choice(_asking(question, reference), answer))
    if is_number(reference):
        aside = "" if _YEAR.fullmatch(reference.strip()) else _ASIDES.sub(" ", answer)
        said = aside if re.search(r"\d", aside) else answer
        return number_committed_to(_asking(question, reference), said, context=question.text)
    if plain in _YES | _NO:
        words = normalise(answer).split()
        same, other = (_YES, _NO) if plain in _YES else (_NO, _YES)
        ends = {words[0], words[-1]} if words else set()
        return bool(ends & same) and not ends & other
    return any(_states(sentence, plain) for sentence in _SENTENCE.split(answer))


def _asking(question: Question, reference: str) -> Question:
    return Question(id=question.id, text=question.text, answer=reference, metadata=question.metadata)


def _states(sentence: str, plain: str) -> bool:
    """Whether the sentence says it: as whole words, not denied just before, and without an alternative."""
    said = normalise(sentence)
    if _is_unspaced(plain):
        at = said.replace(" ", "").find(plain.replace(" ", ""))
        return bool(plain) and at >= 0
    found = re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", said) if plain else None
    if found is None:
        return False
    before, after = said[: found.start()], said[found.end() :]
    if _DENIED.search(" ".join(before.split()[-4:])) or _REFUTED.match(after):
        return False
    return not _HEDGED.search(f"{before} | {after}")


def _is_unspaced(text: str) -> bool:
    """Chinese, Japanese and Thai set no spaces between words."""
    return any(unicodedata.name(letter, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI")) for letter in text)
