"""Verifiers: is an answer right? From a trajectory's final message to r_ans.

First step of `verifiers -> rewards -> advantages -> loss`. Only the model's own final message is ever judged
(`Trajectory.answer`), never a tool's output, and no verifier is content with the reference somewhere *inside* the
answer: an answer that lists every candidate is wrong. Standard library only, but for `math`, which needs the extra
of that name.

`prose` is for agents that answer as people do. "There are 259 of part-7 in stock." is right where 259 is expected, "It
could be Paris or Rome." is not where Paris is: what is looked for is a commitment, not an occurrence. Where in doubt
the answer is wrong, so that no policy learns to list candidates. The other rules (`short_answers`) want an answer that
is nothing but the answer.

A judge (`judging.judge.AnswerJudge`) slots in as one more: `verify(q, a, verifiers={**VERIFIERS, "judge": my_judge})`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from metis_agent.errors import ConfigurationError, InfrastructureError, MetisError
from metis_agent.judging.mathematics import math
from metis_agent.judging.short_answers import choice, exact, is_number, normalise, number_committed_to, numeric
from metis_agent.types import Question, Trajectory

__all__ = [
    "ALIASES",
    "JUDGE",
    "UNKNOWN_VERIFIER",
    "VERIFIERS",
    "UnknownVerifierError",
    "Verifier",
    "Verify",
    "ask_ahead",
    "judge",
    "judged",
    "prose",
    "register_verifier",
    "verify",
]

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


_BATCH = 64

Verify = Callable[[Question, str], bool | None]
"""What judges an answer: `verify`, or that with other verifiers bound to it."""


class Verifier(Protocol):
    """Judges one answer."""

    def __call__(self, question: Question, answer: str) -> bool | None:
        """Say whether `answer`, the model's own final message, answers `question` rightly.

        Returns:
            `None` where it can't be judged, for instance without a reference answer.

        Raises:
            JudgeUnavailableError: The judge is down; the rollout is then excluded and counted, not scored.
        """
        ...


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "choice": choice, "math": math, "prose": prose}
"""The verifiers by the name that `Question.verifier` gives. One of your own joins them by `register_verifier`."""


def register_verifier(name: str, verifier: Verifier) -> None:
    """Make a verifier known by a name that questions can give.

    Raises:
        ConfigurationError: the name is taken by another, or is "judge", which stands for the judge that is named.
    """
    if name == JUDGE or VERIFIERS.get(name, verifier) is not verifier:
        raise ConfigurationError(f"The verifier {name!r} is there already; known are {sorted(VERIFIERS)!r}.")
    VERIFIERS[name] = verifier


JUDGE = "judge"
"""The verifier of questions that a model judges: there once one is named (`AnswerJudge`, `--judge`)."""


def verify(
    question: Question, answer: str, *, verifiers: Mapping[str, Verifier] = VERIFIERS, name: str | None = None
) -> bool | None:
    """Judge an answer with the verifier that its question names.

    Args:
        question: The question, its reference answer and the name of its verifier.
        answer: The model's own final message; an empty one is wrong.
        verifiers: By name; pass your own to add or replace one.
        name: Of the verifier to use, whatever the question names.

    Returns:
        True (right), False (wrong) or None (can't be judged).

    Raises:
        ConfigurationError: The question names a verifier that is not there, or one that fails or says something else.
        JudgeUnavailableError: From a judge that is down.
    """
    name = name or question.verifier
    if name not in verifiers:
        remedy = "Pass it in `verifiers`, register it (`register_verifier`), or change `Question.verifier`."
        if name == JUDGE:
            remedy = (
                "Name the model that judges: `--judge MODEL`, `judge: MODEL` in the configuration of a training, or "
                "`verifiers={**VERIFIERS, 'judge': AnswerJudge(m)}`."
            )
        raise UnknownVerifierError(
            f"Question {question.id!r} asks for the verifier {name!r}; known are {sorted(verifiers)!r}. {remedy}"
        )
    try:
        right = verifiers[name](question, answer)
    except MetisError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"The verifier {name!r} failed on the answer {answer!r:.200} to question {question.id!r}: "
            f"{type(error).__name__}: {error}. Let it say False of an answer that it can't read."
        ) from error
    if right is not None and right not in (True, False):
        raise ConfigurationError(f"The verifier {name!r} returned {right!r}: it says True, False or None.")
    return None if right is None else bool(right)


UNKNOWN_VERIFIER = "by an unknown verifier (name one by --verifier or --judge, or register it)"


class UnknownVerifierError(ConfigurationError):
    """A question names a verifier that is not there."""


def judge(trajectory: Trajectory, verify: Verify = verify) -> tuple[bool | None, str]:
    """Judge one trajectory's final message.

    Returns:
        Right, wrong or `None` with the reason: "failed run", "judge unavailable", or "no reference".

    Raises:
        ConfigurationError: as `verify`.
    """
    if trajectory.status == "failed":
        return None, "failed run"
    try:
        right = verify(trajectory.question, trajectory.answer)
    except InfrastructureError:
        return None, "judge unavailable"
    return right, "" if right is not None else "no reference"


def judged(
    trajectories: Iterable[Trajectory], verify: Verify = verify, *, foreign: bool = False
) -> Iterator[tuple[Trajectory, bool | None, str]]:
    """Each trajectory with what `judge` says of it, read in batches so that a judge is asked for many at once.

    Such a judge has a method `judge(answers: Sequence[tuple[Question, str]])` and keeps its verdicts, as
    `judging.judge.AnswerJudge` does.

    Args:
        trajectories: Read once.
        verify: Judges an answer.
        foreign: They are somebody else's records: one that names a verifier that is not there is not judged, with the
            reason `UNKNOWN_VERIFIER`.

    Raises:
        ConfigurationError: as `verify`.
    """
    remaining = iter(trajectories)
    while batch := list(islice(remaining, _BATCH)):
        ask_ahead([(run.question, run.answer) for run in batch if run.status != "failed"], verify)
        for trajectory in batch:
            try:
                right, reason = judge(trajectory, verify)
            except UnknownVerifierError:
                if not foreign:
                    raise
                right, reason = None, UNKNOWN_VERIFIER
            yield trajectory, right, reason


def ask_ahead(answers: Sequence[tuple[Question, str]], verify: Verify = verify) -> None:
    """Ask the judges that `verify` has about many answers at once; they keep their verdicts."""
    bound = getattr(verify, "keywords", {})
    verifiers: Mapping[str, Any] = bound.get("verifiers", VERIFIERS)
    asked: dict[int, tuple[Any, list[tuple[Question, str]]]] = {}
    for question, answer in answers:
        name = bound.get("name") or question.verifier
        judge_of = verify if hasattr(verify, "judge") else verifiers.get(name)
        if hasattr(judge_of, "judge"):
            asked.setdefault(id(judge_of), (judge_of, []))[1].append((question, answer))
    for judge_of, pairs in asked.values():
        judge_of.judge(pairs)
