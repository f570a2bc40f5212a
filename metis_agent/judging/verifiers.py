"""Is an answer right? The verifiers that turn a trajectory's final message into r_ans.

First step of `verifiers -> rewards -> advantages -> loss`. Only the model's own final message is ever judged
(`Trajectory.answer`), never a tool's output, and a verifier never looks for the reference *inside* the
answer: an answer that lists every candidate is wrong. Standard library only, but for `math`, which needs the extra
of that name.

A judge (`hdpo.judge.AnswerJudge`) slots in as one more: `verify(q, a, verifiers={**VERIFIERS, "judge": my_judge})`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Protocol

from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.judging.mathematics import math
from metis_agent.types import Question, Trajectory

__all__ = ["VERIFIERS", "Verifier", "Verify", "choice", "exact", "judge", "normalise", "numeric", "verify"]

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


# --- exact --------------------------------------------------------------------------------------------------

_LEAD_IN = re.compile(r"^\W*(?:so\W+)?(?:(?:the|my)\s+)?(?:final\s+|correct\s+)?answer\s*(?:is\b\s*:?|:)\s*", re.I)
_ARTICLE = re.compile(r"^(?:the|an?)\s+(?=\S)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_DASHES = str.maketrans(dict.fromkeys("−‐‑‒–—", "-"))
# A full stop goes unless a digit follows, a dash unless it is the sign of a number.
_DELETED = re.compile(r"['’‘`]|\.(?!\d)")
_SPACED = re.compile(r"[\"“”„«»,;:!?¡¿()\[\]{}…*_]|(?<=\w)-|-(?!\d)")


def normalise(text: str) -> str:
    """Reduce a short answer to what matters: NFKC, case, a leading article, prose punctuation, whitespace.

    What tells answers apart stays: signs, decimal points and symbols (`C++`, `$5`, `-3`, `1.5`).

    Example:
        >>> normalise('  The "Eiffel  Tower". ')
        'eiffel tower'
    """
    text = _LEAD_IN.sub("", unicodedata.normalize("NFKC", text).strip())
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text.translate(_DASHES))
    text = _SPACED.sub(" ", _DELETED.sub("", text))
    return _ARTICLE.sub("", " ".join(text.casefold().split()))


def exact(question: Question, answer: str) -> bool | None:
    """Right if the whole answer equals the reference, both normalised; containing it is not enough."""
    if question.answer is None or not normalise(question.answer):
        return None
    return normalise(answer) == normalise(question.answer)


# --- numeric ------------------------------------------------------------------------------------------------

_SCALES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "M": 10**6, "billion": 10**9, "bn": 10**9}
_SCALES |= {"trillion": 10**12}
_UNSIGNED = r"(?>\d{1,3}(?:[,_']\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?<![\w.^])(?P<sign>(?<![\w)%])[-+](?=[$€£¥]?\.?\d))?[$€£¥]?(?:"
    rf"(?P<whole>\d+)\s+(?P<part>\d+/\d+)|(?P<numerator>{_UNSIGNED})\s?/\s?(?P<denominator>{_UNSIGNED})|"
    rf"(?:(?P<mantissa>{_UNSIGNED})\s?[x×*·]\s?)?10\s?(?:\^|\*\*)\s?\(?(?P<power>[-+]?\d{{1,3}})\)?|"
    rf"(?P<plain>{_UNSIGNED})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?)"
    r"(?![\d^])(?:\s?(?P<scale>(?i:thousand|million|billion|trillion))\b|(?P<suffix>k|M|bn)\b)?"
    r"\s?(?P<percent>%|percent\b)?"
)
# Between the last two numbers these make alternatives of them, and not a derivation: a word of doubt; nothing
# but (a unit and) a separator; the colon of a ratio.
_HEDGED = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|alternatively|otherwise|not|could|might|may be)\b|"
    r"^[^\W\d]*\s*[,;/&~-]?\s*(?:and|to|through)\s*$|^\s*[^\W\d]*\s*[,;/&~-]\s*$|^[\s.]*$|^:$",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class _Number:
    value: Fraction
    tolerance: Fraction
    percent: bool
    span: tuple[int, int]


def numeric(question: Question, answer: str) -> bool | None:
    """Right if the number that the answer commits to equals the reference number.

    Read are thousands separators (`1,234`, `1_234`, `1'234`), signs, decimals, fractions (`3/4`, `1 1/2`,
    `½`), scientific notation (`1.2e3`, `1.2 x 10^3`), `thousand` to `trillion`, currency signs, and percents
    (`50%` is 0.5; where the reference has a percent sign the bare number before it is right too). Words such
    as "twelve" and decimal commas are not.

    Of a sentence with several numbers the *last* counts ("12 + 30 = 42"), unless it is offered as an
    alternative to the one before ("41 or 42", "41, 42", "41-42", "maybe 42"): such hedging is wrong whatever
    it holds.

    Tolerance, by the way the reference is written: an integer 1e-6 (absolute: the noise of a float); a
    decimal half a unit of its last place (`3.14` accepts 3.14159 and not 3.1); a fraction or scientific
    notation 1e-3 (relative).
    """
    references = _numbers(question.answer or "")
    if not references:
        return None
    reference, given = references[-1], _committed(answer)
    if given is None:
        return False
    right = abs(given.value - reference.value) <= reference.tolerance
    if reference.percent and not given.percent:
        right |= abs(given.value / 100 - reference.value) <= reference.tolerance
    return right


def _committed(answer: str) -> _Number | None:
    text = _plain(answer)
    numbers = _numbers(answer)
    if not numbers:
        return None
    last = numbers[-1]
    others = [number for number in numbers if number.value != last.value]
    if others and _HEDGED.search(text[others[-1].span[1] : last.span[0]]):
        return None
    return last


def _numbers(text: str) -> list[_Number]:
    parsed = (_parse(match) for match in _NUMBER.finditer(_plain(text)))
    return [number for number in parsed if number is not None]


def _parse(match: re.Match[str]) -> _Number | None:
    part = {name: re.sub("[,_']", "", text or "") for name, text in match.groupdict().items()}
    written = part["plain"] or part["mantissa"] or part["numerator"]
    try:
        if part["whole"]:
            value = Fraction(part["whole"]) + Fraction(part["part"])
        elif part["numerator"]:
            value = Fraction(part["numerator"]) / Fraction(part["denominator"])
        else:
            value = Fraction(written or 1) * Fraction(10) ** int(part["power"] or part["exponent"] or 0)
    except (ZeroDivisionError, ValueError):  # ValueError: more digits than Python will parse
        return None
    unit = Fraction(_SCALES.get(part["scale"].lower() or part["suffix"], 1)) / (100 if part["percent"] else 1)
    if part["whole"] or part["numerator"] or part["power"] or part["exponent"]:
        tolerance = abs(value) * unit / 1000
    elif "." in written:
        tolerance = unit / (2 * 10 ** len(written.split(".")[1]))
    else:
        tolerance = Fraction(1, 10**6)
    sign = -1 if part["sign"] == "-" else 1
    return _Number(
        value=sign * value * unit,
        tolerance=tolerance,
        percent=bool(part["percent"]),
        span=match.span(),
    )


def _plain(text: str) -> str:
    """NFKC, except where it would join what is apart: `1½` is not 11/2, `10²` is not 102, `1 234` is 1234."""
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"[⁺⁻⁰¹²³⁴-⁹]+", r"^\g<0>", text)
    text = re.sub(r"[¼-¾⅐-⅞]", r" \g<0>", text)
    return unicodedata.normalize("NFKC", text).translate(_DASHES).replace("⁄", "/")


# --- choice -------------------------------------------------------------------------------------------------

_LETTER = r"(?<![\w'’])([A-Z])(?![\w'’+#])"
_OPEN, _CLOSE = r"[\s(\[{*\"'`$]*", r"[\s)\]}*\"'`$]*"
_BARE = re.compile(rf"^{_OPEN}(?:\\boxed\{{|option\s+|choice\s+)?([A-Za-z]){_CLOSE}[.,:;!]?{_CLOSE}$", re.I)
_LOWER = re.compile(r"\([a-z]\)|\b(?i:(?:answer\s*(?:is|:)|option|choice)\s*)[a-z](?=\W*$)")
_ANSWER = re.compile(rf"\b(?i:answer\s*(?:is\b\s*:?|:)(?:\s*option\b)?){_OPEN}{_LETTER}")
_OPTION = re.compile(rf"\b(?i:option|choice|choose|select|pick)\b(?i:\s*:|\s+option\b)?{_OPEN}{_LETTER}")
_OPENING = re.compile(rf"^{_OPEN}{_LETTER}(?=[)\]}}*]|\s*[.:,;/&-]|\s+(?:or|and)\b|\s*$)")
_DRESSED = re.compile(r"[(\[{*]([A-Z])[)\]}*]")
# "A dog" is an article, "or A is" a letter.
_NO_ARTICLE = r"(?!(?<=[AI])\s+[a-z]{3})"
_ALSO = (
    re.compile(rf"^{_CLOSE}(?:[,;/&-]|\b(?:or|and)\b){_OPEN}(?:(?:or|and)\b)?{_OPEN}{_LETTER}{_NO_ARTICLE}"),
    re.compile(rf"^[\s.,;:)\]}}*]*{_OPEN}{_LETTER}(?=[.,;:)\]}}*]|\s*$)"),
    re.compile(rf"\b(?i:or|maybe|perhaps|possibly|alternatively|could|might|also)\b[^.!?\n]*?{_LETTER}{_NO_ARTICLE}"),
)


def choice(question: Question, answer: str) -> bool | None:
    """Right if the answer commits to the reference's letter and to no other.

    Read are `B`, `b`, `(B)`, `**B**`, `B.`, `B) Paris`, `Option B`, "The answer is B, because ...". An answer
    that names no letter, or that leaves another open ("A or B", "B, maybe C", "(A) (B)"), is wrong.
    """
    reference = _chosen(question.answer or "")
    if reference is None:
        return None
    return _chosen(answer) == reference


def _chosen(text: str) -> str | None:
    text = unicodedata.normalize("NFKC", text).strip()
    if bare := _BARE.match(text):
        return bare[1].upper()
    text = _LOWER.sub(lambda match: match[0].upper(), text)
    commitments = list(_ANSWER.finditer(text))
    if not commitments:
        commitments = list(_OPTION.finditer(text)) or list(_OPENING.finditer(text))
        commitments += _DRESSED.finditer(text)
    letters = {match[1] for match in commitments}
    for match in commitments:
        rest = text[match.end() :]
        letters |= {other[1] for pattern in _ALSO if (other := pattern.search(rest))}
    return letters.pop() if len(letters) == 1 else None


# --- the registry -------------------------------------------------------------------------------------------

VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {"exact": exact, "numeric": numeric, "choice": choice, "math": math}
)
"""The verifiers by the name that `Question.verifier` gives."""


def verify(question: Question, answer: str, *, verifiers: Mapping[str, Verifier] = VERIFIERS) -> bool | None:
    """Judge an answer with the verifier that its question names.

    Args:
        question: The question, its reference answer and the name of its verifier.
        answer: The model's own final message; an empty one is wrong.
        verifiers: By name; pass your own to add or replace one.

    Returns:
        True (right), False (wrong) or None (can't be judged).

    Raises:
        ConfigurationError: The question names a verifier that is not there.
        JudgeUnavailableError: From a judge that is down.
    """
    if question.verifier not in verifiers:
        raise ConfigurationError(
            f"Question {question.id!r} asks for the verifier {question.verifier!r}; known are "
            f"{sorted(verifiers)!r}. Pass it in `verifiers`, or change `Question.verifier`."
        )
    return verifiers[question.verifier](question, answer)


def judge(trajectory: Trajectory, verify: Verify = verify) -> tuple[bool | None, str]:
    """Judge one trajectory's final message.

    Returns:
        Right, wrong or `None` with the reason: "failed run", "judge unavailable" or "no reference".
    """
    if trajectory.status == "failed":
        return None, "failed run"
    try:
        right = verify(trajectory.question, trajectory.answer)
    except InfrastructureError:
        return None, "judge unavailable"
    return right, "" if right is not None else "no reference"
