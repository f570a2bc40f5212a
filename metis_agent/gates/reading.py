"""How a gate reads text: words by Unicode, and the conversation that a question goes on from.

Where it stands: **reading** -> `features` -> scorer and trainer, which both call it, so that what was trained is what
is served. Plain Python on purpose, no numpy. Two spaces of hashed n-grams for the question, words and *skeleton*
(function words kept, names, numbers and other words replaced by their shape), because how a question is put says more
about whether it will be answered rightly than the rare words in it; and one for the conversation before it: its words
under a name of their own, and each of them together with each word of the question, since "and its river?" says
something only with the place that was spoken of. What the tools have brought in this turn is read likewise.

A word is a run of letters with their marks, in any script; in those that put no space between words (Chinese,
Japanese, Thai) it is one character with its marks. Text in ASCII is read as reading 1 did.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from metis_agent.errors import CheckpointError

if TYPE_CHECKING:
    from metis_agent.gates.artefact import Artefact

__all__ = [
    "BUCKETS",
    "FURTHEST",
    "LONGEST",
    "PLACES",
    "READING",
    "SEEN",
    "Familiarity",
    "canonical",
    "conversation_before",
    "ends_of",
    "hashed_conversation",
    "hashed_ngrams",
    "hashed_words",
    "is_year",
    "load_familiarity",
    "observed",
    "reading_of",
    "spoken",
    "strangeness",
    "tokens_of",
    "words_and_numbers",
]

READING = 2
"""How text becomes words; an artefact says which it was trained with. In 1 each letter outside ASCII was a word."""
BUCKETS = 2**17
"""Size of the hashed space that all n-grams share."""
LONGEST = 20_000
"""Characters of a text that are read."""

SEEN = "seen_ngrams"
"""Name of the tensor: one bit for each place of the hashed space, in words of 64."""
PLACES = 2**20
FURTHEST = 6.0
"""Standard deviations of length beyond which a question is not stranger still."""

_ENDS = {"c": (40, 24, 400), "d": (120, 60, 2000)}
"""Words that a context, and a draft, is read for where it begins and where it ends, and characters of each end."""
_TURNS, _TURN = 6, 500
"""Messages of a conversation that are read, the last ones, and characters of each."""
_RESULTS = 20
_HEARD, _ASKED = 24, 12
"""Words of the conversation and of the question that are read together."""

_ASCII = re.compile(r"[A-Za-z]+|\d[\d,.]*|[^\sA-Za-z\d]")
_LETTERS = re.compile(r"[a-z]+|\d[\d,.]*")
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
# Han, kana, Thai, Lao, Burmese, Khmer.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
_PLAIN = str.maketrans(
    "\u2212\u060c\u061b\u061f\u06d4\u066b\u066c\u0964\u3001\u3002\u00bf\u00a1",
    "-,;?..,.,.?!",
    "\u00ad\u0640\u200b\u200c\u200d\u200e\u200f\u2060\ufeff",
)
"""Punctuation of other scripts as ASCII's, but for quotes and dashes, whose style tells where a text comes from; what
is not seen (soft hyphens, joiners, marks of direction) goes."""

_FUNCTION_WORDS = frozenset(
    """
    a about after all also am an and any are as at be been before being between both but by can could did
    do does during each for from had has have he her his how if in into is it its last many may more most
    much name named new no not of on one only or other out over people same she should since so some than
    that the their them then there these they this those three to two type under until up use used using
    was we were what when where which while who whom whose why will with within without would year years
    first second total average percentage change difference respective respectively
    """.split()  # noqa: SIM905
)


def canonical(text: str) -> str:
    """The text with one form for each letter, ASCII's digits and punctuation; ASCII as it is.

    Example:
        >>> canonical("متى؟ ４२")
        'متى? 42'
    """
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return _OTHER_DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), plain)


def tokens_of(text: str, reading: int = READING) -> list[str]:
    """Words, numbers and signs, in order.

    Example:
        >>> tokens_of("Ämter in नेपाल, 北京?")
        ['Ämter', 'in', 'नेपाल', ',', '北', '京', '?']
    """
    text = text[:LONGEST]
    if reading == 1 or text.isascii():
        return _ASCII.findall(text)
    return _any_script().findall(canonical(text)[:LONGEST])


def words_and_numbers(text: str, reading: int = READING) -> list[str]:
    """Words and numbers in lower case, without signs."""
    text = text[:LONGEST].lower()
    if reading == 1 or text.isascii():
        return _LETTERS.findall(text)
    return [token for token in tokens_of(text, reading) if token[0].isalpha() or token[0].isdigit()]


def spoken(text: str, reading: int = READING) -> list[str]:
    """Words of a text as its spaces divide them, in lower case; where a script has none, its characters."""
    text = text.lower()
    if reading == 1 or text.isascii():
        return text.split()
    pieces = canonical(text).split()
    divided = _unspaced()
    return list(
        itertools.chain.from_iterable(tokens_of(piece) if divided.search(piece) else (piece,) for piece in pieces)
    )


@lru_cache(maxsize=64)  # the states of a run share their question
def hashed_ngrams(
    question: str, buckets: int = BUCKETS, reading: int = READING
) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """Counts by bucket, for the words (1 to 3 in a row, and how the question begins and ends) and the skeleton.

    Example:
        >>> words, skeleton = hashed_ngrams("Who wrote Emma?")
        >>> all(0 <= bucket < BUCKETS for bucket in (*words, *skeleton))
        True
    """
    tokens = tokens_of(question, reading)
    return _counts("w", _word_ngrams(tokens), buckets), _counts("s", _skeleton_ngrams(tokens), buckets)


def hashed_conversation(question: str, history: str) -> dict[int, int]:
    """Counts by bucket of what was said before, alone and together with what is asked; empty where nothing was.

    Args:
        question: What is asked now.
        history: As `conversation_before` writes it.
    """
    lines = history.split("\n") if history else []
    tokens = [token for token in tokens_of(question) if token[0].isalnum()]
    asked = list(dict.fromkeys(token.lower() for token in tokens))[:_ASKED]
    names = {token.lower() for token in tokens[1:] if token[0].isupper()}
    before: dict[str, None] = dict.fromkeys(_state_words(asked, names, lines))
    counts: dict[int, int] = {}
    for line in reversed(lines):
        words, said = _hashed_line(line)
        for bucket, times in said.items():
            counts[bucket] = counts.get(bucket, 0) + times
        before |= dict.fromkeys(words)
    heard = [word for word in before if word not in _FUNCTION_WORDS][:_HEARD]
    start, others = zlib.crc32(b"h"), _encoded(("", *asked))
    for one in _encoded(heard):
        begun = zlib.crc32(one + b" | ", start)
        for other in others:
            bucket = zlib.crc32(other, begun) % BUCKETS
            counts[bucket] = counts.get(bucket, 0) + 1
    return counts


@lru_cache(maxsize=64)  # and the first states' lines are those of the later ones
def _hashed_line(line: str) -> tuple[tuple[str, ...], Mapping[int, int]]:
    """Words of one line of a conversation, and counts by bucket of who said them, alone and in pairs."""
    who, _, text = line.partition(": ")
    words = [_shape(token) if token[0].isdigit() else token.lower() for token in tokens_of(text)]
    said = _encoded([f"{who} {word}" for word in words] + [f"{who} {a} {b}" for a, b in itertools.pairwise(words)])
    return tuple(word for word in words if word[0].isalnum() or word[0] == "#"), _counts("h", said)


def ends_of(text: str, space: str = "d") -> str:
    """As much of a long text as `hashed_words` reads: how it begins and how it ends."""
    end = _ENDS[space][2]
    return text if len(text) <= 2 * end else f"{text[:end]} {text[-end:]}"


def hashed_words(space: str, text: str) -> Mapping[int, int]:
    """Counts by bucket of the words that a long text begins and ends with, alone and in pairs.

    Args:
        space: "c" for what came with a question, "d" for a draft of its answer.
        text: Any.
    """
    tokens = tokens_of(ends_of(text, space))
    first, last, _ = _ENDS[space]
    if len(tokens) > first + last:
        tokens = tokens[:first] + tokens[-last:]
    words = _encoded(_shape(token) if token[0].isdigit() else token.lower() for token in tokens)
    return _counts(space, itertools.chain(words, map(b" ".join, itertools.pairwise(words))))


def _state_words(asked: Sequence[str], names: Set[str], lines: Sequence[str]) -> Iterator[str]:
    """Words for how far a turn is: calls so far, and how much of what is asked, of whom, the latest result tells."""
    results = [line for line in lines if line.startswith(("tool: ", "failed: "))]
    if results:
        content = [word for word in asked if word not in _FUNCTION_WORDS]
        found = set(words_and_numbers(results[-1].split(": ", 2)[-1]))
        share = sum(word in found for word in content) / len(content) if content else 0.0
        yield f"calls {len(results)}"
        yield f"calls {len(results)} found {round(3 * share)}"
        if names:
            told = "all" if names <= found else "some" if names & found else "none"
            yield f"calls {len(results)} names {told}"
        if results[-1] in results[:-1]:
            yield "again"
        if results[-1].startswith("failed: "):
            yield "failed"


def conversation_before(messages: Iterable[Any]) -> str:
    r"""What user and assistant said, one line a message: the last few, each cut to its beginning.

    Args:
        messages: LangChain messages, their dicts as records hold them, or dicts with "role" and "content"; system
            prompts, calls and results are left out.

    Example:
        >>> conversation_before([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
        'user: Hi\nassistant: Hello!'
    """
    lines = []
    for message in messages:
        record: Any = message if isinstance(message, Mapping) else {"type": message.type, "content": message.content}
        inner = record.get("data")
        content = (inner if isinstance(inner, Mapping) else record).get("content", "")
        who = _SPEAKERS.get(str(record.get("type") or record.get("role")))
        text = " ".join(_text_of(content)[:LONGEST].split())[:_TURN]
        if who and text:
            lines.append(f"{who}: {text}")
    return "\n".join(lines[-_TURNS:])


def observed(results: Iterable[tuple[str, str, bool]]) -> str:
    """What tools have brought so far, one line a call: the last ones, each cut to its beginning.

    Args:
        results: (tool, content, whether it failed) of each call that ran, in order.

    Example:
        >>> observed([("search", "Kagika lies on the Babo.", False)])
        'tool: search: Kagika lies on the Babo.'
    """
    lines = [
        f"{'failed' if failed else 'tool'}: {tool}: {' '.join(content[:LONGEST].split())[:_TURN]}"
        for tool, content, failed in results
    ]
    return "\n".join(lines[-_RESULTS:])


def is_year(number: str) -> bool:
    """Whether a number has the form of a year of the last two centuries."""
    digits = number.strip(".,")
    return len(digits) == 4 and digits[:2] in ("19", "20")


def reading_of(artefact: Artefact) -> int:
    """How the gate's training read text, see `metis_agent.gates.reading.READING`.

    Raises:
        CheckpointError: in a way that is not known here.
    """
    found = artefact.description.get("reading", 1)
    if found not in (1, READING) or isinstance(found, bool):
        raise CheckpointError(
            f"{str(artefact.folder)!r} has the reading {found!r}; known are 1 and {READING}: export the gate again."
        )
    return int(found)


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """What a gate has seen, and from when on a question is unlike it.

    Training calibrates a score on questions that it held out, and on other people's (`metis_agent.hdpo.gate_trainer`);
    `PolicyGate` leaves a question above the threshold to the model. The text alone is read: with w and s the shares of
    the question's word and skeleton n-grams that no training question had, and l how far its length is from theirs, in
    standard deviations, the score is sigmoid(b0 + b1 w + b2 s + b3 min(l, 6)), b1, b2, b3 >= 0.
    """

    seen: Sequence[int]
    """[PLACES / 64]"""
    weights: tuple[float, float, float, float]
    """b0 to b3."""
    length: tuple[float, float]
    """Mean and standard deviation of log(1 + characters)."""
    threshold: float
    reading: int = READING
    """How its training read text."""

    def score(self, question: str) -> float:
        """How unlike training a question is, in [0, 1]."""
        words, skeleton = map(self._unseen, hashed_ngrams(question, PLACES, self.reading))
        return strangeness(self.weights, words, skeleton, length_surprise(question, self.length))

    def _unseen(self, counts: Mapping[int, int]) -> float:
        new = sum(not self.seen[place >> 6] >> (place & 63) & 1 for place in counts)
        return new / len(counts) if counts else 1.0


def strangeness(weights: Sequence[float], words: float, skeleton: float, length: float) -> float:
    """The score of a question from what is new in it."""
    z = weights[0] + weights[1] * words + weights[2] * skeleton + weights[3] * length
    return 1 / (1 + math.exp(-max(-500.0, min(500.0, z))))


def length_surprise(question: str, length: tuple[float, float]) -> float:
    """Standard deviations between the question's length and the usual one, at most `FURTHEST`."""
    return min(FURTHEST, abs(math.log1p(len(question)) - length[0]) / length[1])


def load_familiarity(artefact: Artefact) -> Familiarity | None:
    """That of a gate; `None` where it was trained without, by an earlier version or on too few questions.

    Raises:
        CheckpointError: a part of it is missing or no finite number.
    """
    told: Any = artefact.description.get("familiarity")
    if told is None:
        return None
    try:
        found = Familiarity(
            seen=artefact.tensors[SEEN].values,
            weights=tuple(float(weight) for weight in told["weights"]),  # type: ignore[arg-type]
            length=(float(told["length"]["mean"]), float(told["length"]["deviation"])),
            threshold=float(told["threshold"]),
            reading=reading_of(artefact),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
    numbers = (*found.weights, *found.length, found.threshold)
    whole = len(found.seen) == PLACES // 64 and artefact.tensors[SEEN].values.typecode == "Q" and len(numbers) == 7
    if not (whole and all(map(math.isfinite, numbers)) and found.length[1] > 0):
        raise CheckpointError(
            f"{str(artefact.folder)!r} has a familiarity that fits no gate: {told!r}; export it again."
        )
    return found


_SPEAKERS = {"human": "user", "user": "user", "ai": "assistant", "assistant": "assistant"}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, Sequence) else ()
    return " ".join(
        block if isinstance(block, str) else str(block.get("text", ""))
        for block in blocks
        if isinstance(block, str | Mapping)
    )


@cache
def _any_script() -> re.Pattern[str]:
    """One word, number or sign of any script; built when it is first needed, from Python's own tables."""
    marks = _ranges(code for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    letter, unspaced = rf"[^\W\d_{_UNSPACED}]", rf"(?:(?![\d{marks}])[{_UNSPACED}])"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|{unspaced}[{marks}]*|\d[\d,.]*|\S")


@cache
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[{_UNSPACED}]")


def _ranges(codes: Iterator[int]) -> str:
    """Code points as ranges of a character class."""
    found: list[list[int]] = []
    for code in codes:
        if found and code == found[-1][1] + 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in found)


def _shape(number: str) -> str:
    return "yyyy" if is_year(number) else f"#{len(number.strip('.,'))}"


def _word_ngrams(tokens: Sequence[str]) -> Iterator[bytes]:
    words = _encoded(_shape(token) if token[0].isdigit() else token.lower() for token in tokens)
    yield from words
    yield from map(b" ".join, itertools.pairwise(words))
    yield from map(b" ".join, zip(words, words[1:], words[2:], strict=False))
    for length in (1, 2, 3):
        yield b"^" + b" ".join(words[:length])
    if len(words) > 1:
        yield words[-2] + b"$"


def _skeleton_ngrams(tokens: Sequence[str]) -> Iterator[bytes]:
    shapes = _encoded(("^", *map(_skeleton, tokens), "$"))
    yield from shapes
    for length in (2, 3, 4):
        yield from map(b" ".join, zip(*(shapes[start:] for start in range(length)), strict=False))


def _skeleton(token: str) -> str:
    lowered = token.lower()
    if lowered in _FUNCTION_WORDS:
        return lowered
    if token[0].isdigit():
        return _shape(token)
    if token[0].isalpha():
        return "X" if token[0].isupper() else "w"
    return token


def _counts(space: str, ngrams: Iterable[bytes], buckets: int = BUCKETS) -> Mapping[int, int]:
    start = zlib.crc32(space.encode())
    return Counter([zlib.crc32(ngram, start) % buckets for ngram in ngrams])


def _encoded(words: Iterable[str]) -> list[bytes]:
    return [word.encode("utf-8", "surrogatepass") for word in words]
