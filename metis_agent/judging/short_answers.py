"""Rules for answers that are nothing but the answer: `exact`, `numeric` and `choice`. Standard library only.

Beside `prose`, which reads sentences; `verifiers` knows them all by name. An answer that offers several is wrong.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from metis_agent.errors import ConfigurationError
from metis_agent.types import Question

__all__ = ["choice", "exact", "is_number", "normalise", "number_committed_to", "numeric"]


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


def is_number(text: str) -> bool:
    """Whether a reference answer is a number, perhaps with a unit or a currency sign, and nothing else."""
    numbers = _numbers(text)
    rest = _NUMBER.sub(" ", _plain(text)).split()
    return len(numbers) == 1 and len(rest) <= 2 and len(" ".join(rest)) <= 12


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
    notation 1e-3 (relative). `Question.metadata["tolerance"]` takes its place: 0.5 (absolute) or "2%".
    """
    return number_committed_to(question, answer) if _numbers(question.answer or "") else None


def number_committed_to(question: Question, answer: str, *, context: str = "") -> bool:
    """Whether the number that `answer` commits to is the reference; numbers of `context` count where no other is."""
    reference, given = _numbers(question.answer or "")[-1], _committed(answer, context)
    if given is None:
        return False
    tolerance = _tolerance(question, reference)
    right = abs(given.value - reference.value) <= tolerance
    if reference.percent and not given.percent:
        right |= abs(given.value / 100 - reference.value) <= tolerance
    return right


def _tolerance(question: Question, reference: _Number) -> Fraction:
    asked = question.metadata.get("tolerance")
    if asked is None:
        return reference.tolerance
    text = str(asked).strip()
    try:
        width = Fraction(text.removesuffix("%"))
    except (ValueError, ZeroDivisionError):
        width = Fraction(-1)
    if width < 0:
        raise ConfigurationError(
            f"Question {question.id!r} has the tolerance {asked!r}; it is a number of at least 0, or a share of the "
            "reference such as '2%'."
        )
    return abs(reference.value) * width / 100 if text.endswith("%") else width


def _committed(answer: str, context: str = "") -> _Number | None:
    text = _plain(answer)
    numbers = _numbers(answer)
    known = {abs(number.value) for number in _numbers(context)} if context else set()
    numbers = [number for number in numbers if abs(number.value) not in known] or numbers
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
