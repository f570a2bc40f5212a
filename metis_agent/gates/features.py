"""The `features` policy at run time: what it reads of a question, and the sparse dot product that it makes of it.

Hashed n-grams, the shape of the question's numbers, what a draft says of itself. Trainer and deployed gate both call
this module, so what was trained is what is served. Plain Python on purpose: a decision has to cost less than a
millisecond without numpy. Two text spaces, words and *skeleton* (function words kept, names, numbers and other words
replaced by their shape), because how a question is put says more about whether it will be answered rightly than the
rare words in it.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from metis_agent.errors import CheckpointError, GateError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.scorers import Asked

__all__ = [
    "AGREEMENT_FEATURES",
    "BUCKETS",
    "CONTEXT_FEATURES",
    "DRAFT_TEXT_FEATURES",
    "QUESTION_FEATURES",
    "FeaturesScorer",
    "agreement",
    "context_features",
    "draft_log_prob_features",
    "draft_text_features",
    "hashed_ngrams",
    "question_features",
    "weighed",
]


BUCKETS = 2**17
"""Size of the hashed space that words and skeletons share."""

QUESTION_FEATURES = (
    "words",
    "characters",
    "numbers",
    "years",
    "names",
    "commas",
    "quotes",
    "word_length",
    "question_mark",
    "lower_case",
    "longest_number",
)
CONTEXT_FEATURES = (
    "characters",
    "table_rows",
    "numbers",
    "words_found",
    "words_found_count",
    "longest_match",
    "longest_match_share",
    "numbers_found",
    "best_row",
    "best_rows",
    "columns",
    "percent_signs",
    "dollar_signs",
    "text_length",
)
AGREEMENT_FEATURES = ("draft_agreement", "draft_containment")
"""Of two direct attempts; the graph makes one."""
DRAFT_TEXT_FEATURES = ("draft_words", "draft_digits", "draft_overlap", "draft_stop")

_WORDS, _SKELETON = 1, 0.5
_LONGEST = 20_000
_TOKEN = re.compile(r"[A-Za-z]+|\d[\d,.]*|[^\sA-Za-z\d]")
_LETTERS = re.compile(r"[a-z]+|\d[\d,.]*")
_ANSWER_WORD = re.compile(r"[^\W\d_]+|\d[\d,.]*")
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
_STOP = frozenset(
    """
    the of in and to a for is was were are what which who how when where why did does do on by with at
    from as an be between respectively it its that their there has have had s
    """.split()  # noqa: SIM905
)


def hashed_ngrams(question: str, buckets: int = BUCKETS) -> tuple[dict[int, int], dict[int, int]]:
    """Counts by bucket, for the words (1 to 3 in a row, and how the question begins and ends) and the skeleton.

    Example:
        >>> words, skeleton = hashed_ngrams("Who wrote Emma?")
        >>> all(0 <= bucket < BUCKETS for bucket in (*words, *skeleton))
        True
    """
    tokens = _TOKEN.findall(question[:_LONGEST])
    return _counts("w", _word_ngrams(tokens), buckets), _counts("s", _skeleton_ngrams(tokens), buckets)


def question_features(question: str) -> list[float]:
    """One number for each of `QUESTION_FEATURES`."""
    question = question[:_LONGEST]
    parts = _LETTERS.findall(question.lower())
    words = [part for part in parts if part[0].isalpha()]
    numbers = [part for part in parts if not part[0].isalpha()]
    return [
        len(words),
        math.log1p(len(question)),
        len(numbers),
        sum(map(_is_year, numbers)),
        sum(part[:1].isupper() for part in question.split()[1:]),
        question.count(","),
        question.count('"') + question.count("'"),
        sum(map(len, words)) / len(words) if words else 0.0,
        question.rstrip().endswith("?"),
        question.islower(),
        max(map(len, numbers), default=0),
    ]


def context_features(question: str, context: str) -> list[float]:
    """One number for each of `CONTEXT_FEATURES`: how the question matches the text or table that comes with it."""
    context = context[:_LONGEST]
    lowered = context.lower()
    asked = _LETTERS.findall(question[:_LONGEST].lower())
    words = [part for part in asked if part[0].isalpha()]
    numbers = [part for part in asked if not part[0].isalpha()]
    given = _LETTERS.findall(lowered)
    content = [word for word in words if word not in _STOP]
    vocabulary = set(given)
    found = sum(word in vocabulary for word in content)
    longest = _longest_match(words, " ".join([part for part in given if part[0].isalpha()]))
    lines = lowered.split("\n")
    rows = [line for line in lines if "|" in line]
    hits = [sum(word in row for word in content) for row in rows] or [0]
    return [
        math.log1p(len(context)),
        math.log1p(len(rows)),
        math.log1p(sum(not part[0].isalpha() for part in given)),
        found / len(content) if content else 0.0,
        found,
        longest,
        longest / max(1, len(words)),
        sum(number.strip(".,") in lowered for number in numbers) / max(1, len(numbers)),
        max(hits) / max(1, len(content)),
        hits.count(max(hits)),
        lowered.count("|") / len(rows) if rows else 0.0,
        context.count("%"),
        context.count("$"),
        sum(len(line) for line in lines if "|" not in line) / 1000,
    ]


def draft_text_features(question: str, draft: str) -> dict[str, float]:
    """What the text of a direct draft shows, by the names of `DRAFT_TEXT_FEATURES`."""
    words = draft.lower().split()
    asked = set(question.lower().split())
    values = (
        math.log1p(len(words)),
        any(character.isdigit() for character in draft),
        sum(word in asked for word in words) / max(1, len(words)),
        draft.strip().endswith("."),
    )
    return dict(zip(DRAFT_TEXT_FEATURES, map(float, values), strict=True))


def draft_log_prob_features(log_probs: Sequence[float]) -> dict[str, float]:
    """Uncertainty of a draft from its tokens' log-probabilities; empty where there are none."""
    if not log_probs:
        return {}
    mean = sum(log_probs) / len(log_probs)
    return {
        "draft_perplexity": math.exp(min(-mean, 700.0)),
        "draft_mean_log_prob": mean,
        "draft_min_log_prob": min(log_probs),
        "draft_first_log_prob": log_probs[0],
        "draft_tokens": float(len(log_probs)),
    }


def agreement(one: str, other: str) -> dict[str, float]:
    """How far two direct attempts agree: shared words over all words, and over the shorter one's.

    Words that say nothing ("the", "of") and how a number is punctuated do not count.

    Example:
        >>> agreement("Grover Cleveland", "President Grover Cleveland.")
        {'draft_agreement': 0.6666666666666666, 'draft_containment': 1.0}
        >>> agreement("the 1,435.", "1435")
        {'draft_agreement': 1.0, 'draft_containment': 1.0}
    """
    a, b = map(_answer_words, (one, other))
    shared = len(a & b)
    return {
        "draft_agreement": shared / max(1, len(a | b)),
        "draft_containment": shared / max(1, min(len(a), len(b))),
    }


def weighed(question: str, idf: Sequence[float]) -> list[tuple[int, float]]:
    """(bucket, value): sublinear counts times `idf`, each space scaled to its length, words twice the skeleton.

    Args:
        question: Any text.
        idf: [BUCKETS], 0 where the n-gram was too rare in training to count.
    """
    vector: list[tuple[int, float]] = []
    for weight, counts in zip((_WORDS, _SKELETON), hashed_ngrams(question), strict=True):
        values = [
            (bucket, (1.0 + math.log(count)) * idf[bucket] if count > 1 else idf[bucket])
            for bucket, count in counts.items()
            if idf[bucket] > 0
        ]
        norm = math.sqrt(sum([value * value for _, value in values]))
        vector += [(bucket, weight * value / norm) for bucket, value in values]
    return vector


def _answer_words(answer: str) -> set[str]:
    words = {word.rstrip(".,").replace(",", "") for word in _ANSWER_WORD.findall(answer[:_LONGEST].lower())}
    return words - _STOP or words


def _is_year(number: str) -> bool:
    digits = number.strip(".,")
    return len(digits) == 4 and digits[:2] in ("19", "20")


def _shape(number: str) -> str:
    digits = number.strip(".,")
    return "yyyy" if _is_year(digits) else f"#{len(digits)}"


def _word_ngrams(tokens: Sequence[str]) -> Iterator[str]:
    words = [_shape(token) if token[0].isdigit() else token.lower() for token in tokens]
    yield from words
    yield from map(" ".join, itertools.pairwise(words))
    yield from map(" ".join, zip(words, words[1:], words[2:], strict=False))
    for length in (1, 2, 3):
        yield "^" + " ".join(words[:length])
    if len(words) > 1:
        yield words[-2] + "$"


def _skeleton_ngrams(tokens: Sequence[str]) -> Iterator[str]:
    shapes = ["^", *map(_skeleton, tokens), "$"]
    yield from shapes
    for length in (2, 3, 4):
        for start in range(len(shapes) - length + 1):
            yield " ".join(shapes[start : start + length])


def _skeleton(token: str) -> str:
    lowered = token.lower()
    if lowered in _FUNCTION_WORDS:
        return lowered
    if token[0].isdigit():
        return _shape(token)
    if token[0].isalpha():
        return "X" if token[0].isupper() else "w"
    return token


def _counts(space: str, ngrams: Iterator[str], buckets: int) -> dict[int, int]:
    counts: dict[int, int] = {}
    start = zlib.crc32(space.encode())
    for ngram in ngrams:
        bucket = zlib.crc32(ngram.encode("utf-8", "surrogatepass"), start) % buckets
        counts[bucket] = counts.get(bucket, 0) + 1
    return counts


def _longest_match(words: Sequence[str], text: str) -> int:
    """How many words in a row of the question stand in the text as they are."""
    text, best = f" {text} ", 0
    for start in range(len(words)):
        while start + best < len(words) and f" {' '.join(words[start : start + best + 1])} " in text:
            best += 1
    return best


class FeaturesScorer:
    """The `features` policy: a sparse dot product.

    Raises:
        CheckpointError: the tensors don't fit together.
    """

    instant = True
    open_tools = False

    def __init__(self, artefact: Artefact, device: str | None = None) -> None:
        try:
            policy, tensors = artefact.description["policy"], artefact.tensors
            self._context = bool(policy["context"])
            self._draft: tuple[str, ...] = tuple(policy["draft"])
            self._log = frozenset(policy["log"])
            self._missing: list[int] = list(policy["missing"])
            self._weight, self._clip = float(policy["number_weight"]), float(policy["clip"])
            self._idf = tensors["idf"].values
            self._mean, self._scale = tensors["number_mean"].values, tensors["number_scale"].values
            self._bias = tensors["bias"].values
            heads = range(len(artefact.tools) + 1)
            self._text = [tensors["text_weights"].row(head) for head in heads]
            self._numbers = [tensors["number_weights"].row(head) for head in heads]
            if tensors["text_weights"].shape[0] != len(heads) or tensors["number_weights"].shape[0] != len(heads):
                raise ValueError(f"weights for other heads than {len(heads)}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error
        self._check(artefact)

    def _check(self, artefact: Artefact) -> None:
        read = len(QUESTION_FEATURES) + self._context * len(CONTEXT_FEATURES) + len(self._draft)
        width, heads = read + len(self._missing), len(artefact.tools) + 1
        sizes = {*map(len, self._text), artefact.description["policy"]["buckets"], len(self._idf)}
        inputs = {*map(len, self._numbers)}
        places = all(isinstance(place, int) and 0 <= place < read for place in (*self._missing, *self._log))
        if (sizes, inputs, {len(self._mean), len(self._scale)}, len(self._bias)) != ({BUCKETS}, {width}, {read}, heads):
            raise CheckpointError(
                f"{str(artefact.folder)!r} has tensors of sizes that don't fit its {heads} heads, {width} "
                f"numbers and {BUCKETS} buckets; train the gate again with this version."
            )
        tensors = (self._idf, self._mean, self._scale, self._bias, *self._text, *self._numbers)
        # A sum is quick, and neither infinity nor what is no number gets lost in it.
        finite = all(math.isfinite(sum(values)) for values in (*tensors, (self._weight, self._clip)))
        if not (places and finite and min(self._scale) > 0 and self._clip > 0):
            raise CheckpointError(
                f"{str(artefact.folder)!r} has weights that are not finite numbers, or scales that are not positive: "
                "it would decide by chance. Train the gate again."
            )

    @property
    def draft_columns(self) -> tuple[str, ...]:
        """What is read of a draft; empty where none is."""
        return self._draft

    def logits(self, asked: Asked) -> list[float]:
        """See `metis_agent.gates.scorers.Scorer`."""
        vector = weighed(asked.question, self._idf)
        numbers = self._inputs(asked.question, asked.context, asked.draft)
        return [
            bias
            + sum([text[bucket] * value for bucket, value in vector])
            + sum([weight * value for weight, value in zip(weights, numbers, strict=True)])
            for bias, text, weights in zip(self._bias, self._text, self._numbers, strict=True)
        ]

    def _inputs(self, question: str, context: str, draft: Mapping[str, float] | None) -> list[float]:
        raw = question_features(question)
        if self._context:
            raw += context_features(question, context)
        first_draft = len(raw)
        raw += [(draft or {}).get(name, math.nan) for name in self._draft]
        gone = {index for index, value in enumerate(raw) if math.isnan(value)}
        if unforeseen := gone - set(self._missing):
            names = [self._draft[index - first_draft] for index in sorted(unforeseen)]
            if not {*names} - {*AGREEMENT_FEATURES}:
                raise GateError(
                    f"The gate was trained on {names!r}, how far two direct attempts agree, and the request brings "
                    "one. Give PolicyGate a `read_draft` that makes a second one and returns "
                    "`metis_agent.gates.features.agreement(one, other)`, or train without the column 'draft_answer'."
                )
            raise GateError(
                f"The gate was trained on {names!r} of a direct draft, and the request has no such numbers. Give the "
                "request a draft with log-probabilities, or PolicyGate a `read_draft` that computes them."
            )
        values = []
        for index, value in enumerate(raw):
            if index in gone:
                values.append(0.0)
                continue
            if index in self._log:
                value = math.log(max(value, 1e-12))
            scaled = (value - self._mean[index]) / self._scale[index]
            values.append(self._weight * min(self._clip, max(-self._clip, scaled)))
        return values + [self._weight * (index in gone) for index in self._missing]
