"""The `features` policy at run time: what it reads of a question, and the sparse dot product that it makes of it.

Hashed n-grams (`metis_agent.gates.reading`), the shape of the question's numbers, the conversation before it, what a
draft says of itself. Trainer and deployed gate both call this module, so what was trained is what is served. Plain
Python on purpose: a decision has to cost less than a millisecond without numpy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from metis_agent.errors import CheckpointError, GateError
from metis_agent.gates.artefact import Artefact
from metis_agent.gates.reading import (
    BUCKETS,
    LONGEST,
    READING,
    canonical,
    hashed_conversation,
    hashed_ngrams,
    hashed_words,
    is_year,
    reading_of,
    spoken,
    words_and_numbers,
)
from metis_agent.gates.scorers import Asked

__all__ = [
    "AGREEMENT_FEATURES",
    "CONTEXT_FEATURES",
    "DRAFT_TEXT_FEATURES",
    "HISTORY_FEATURES",
    "QUESTION_FEATURES",
    "SPACES",
    "STATE_FEATURES",
    "FeaturesScorer",
    "agreement",
    "context_features",
    "draft_log_prob_features",
    "draft_text_features",
    "history_features",
    "question_features",
    "readings",
    "spaces_of",
    "state_features",
    "weighed",
]


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

STATE_FEATURES = ("calls", "brought", "all_found", "last_found", "last_repeats", "failed", "last_failed", "numbers")
"""Of what the tools have brought, for a gate that decides at every step."""
HISTORY_FEATURES = ("turns", "words", "numbers", "longest_number", "words_found")

SPACES = {"w": 1.0, "s": 0.5, "h": 1.0, "c": 1.0, "d": 1.0}
"""Lengths of the text's parts: the question's words and skeleton, and where a gate reads them the conversation, and
the words of the context and of the draft."""
_ANSWER_WORD = re.compile(r"[^\W\d_]+|\d[\d,.]*")
_STOP = frozenset(
    """
    the of in and to a for is was were are what which who how when where why did does do on by with at
    from as an be between respectively it its that their there has have had s
    """.split()  # noqa: SIM905
)


def question_features(question: str, reading: int = READING) -> list[float]:
    """One number for each of `QUESTION_FEATURES`."""
    question = question[:LONGEST]
    parts = words_and_numbers(question, reading)
    words = [part for part in parts if part[0].isalpha()]
    numbers = [part for part in parts if not part[0].isalpha()]
    text = question if reading == 1 else canonical(question)
    return [
        len(words),
        math.log1p(len(question)),
        len(numbers),
        sum(map(is_year, numbers)),
        sum(part[:1].isupper() for part in question.split()[1:]),
        text.count(","),
        text.count('"') + text.count("'"),
        sum(map(len, words)) / len(words) if words else 0.0,
        text.rstrip().endswith("?"),
        question.islower(),
        max(map(len, numbers), default=0),
    ]


def context_features(question: str, context: str, reading: int = READING) -> list[float]:
    """One number for each of `CONTEXT_FEATURES`: how the question matches the text or table that comes with it."""
    context = context[:LONGEST]
    lowered = (context if reading == 1 else canonical(context)).lower()
    asked = words_and_numbers(question, reading)
    words = [part for part in asked if part[0].isalpha()]
    numbers = [part for part in asked if not part[0].isalpha()]
    given = words_and_numbers(lowered, reading)
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


def history_features(question: str, history: str) -> list[float]:
    """One number for each of `HISTORY_FEATURES`: how long the conversation is, and what was asked in it last."""
    lines = history.split("\n") if history else []
    last = next((line for line in reversed(lines) if line.startswith("user: ")), "").removeprefix("user: ")
    parts = words_and_numbers(last)
    numbers = [part for part in parts if not part[0].isalpha()]
    content = [part for part in words_and_numbers(question) if part not in _STOP]
    said = set(words_and_numbers(history))
    return [
        math.log1p(len(lines)),
        len(parts) - len(numbers),
        len(numbers),
        max(map(len, numbers), default=0),
        sum(word in said for word in content) / len(content) if content else 0.0,
    ]


def state_features(question: str, history: str) -> list[float]:
    """One number for each of `STATE_FEATURES`, of the lines of `metis_agent.gates.reading.observed` in a history."""
    lines = [line for line in history.split("\n") if line.startswith(("tool: ", "failed: "))]
    content = {part for part in words_and_numbers(question) if part not in _STOP}
    texts = [line.split(": ", 2)[-1] for line in lines]
    found = [content & set(words_and_numbers(text)) for text in texts]
    failed = [line.startswith("failed: ") for line in lines]
    return [
        len(lines),
        math.log1p(sum(map(len, texts))),
        len(set().union(*found)) / len(content) if content else 0.0,
        len(found[-1]) / len(content) if content and found else 0.0,
        bool(lines) and texts[-1] in texts[:-1],
        sum(failed),
        bool(lines) and failed[-1],
        math.log1p(sum(character.isdigit() for character in texts[-1])) if lines else 0.0,
    ]


def readings(
    question: str,
    context: str | None = None,
    history: str | None = None,
    *,
    steps: bool = False,
    reading: int = READING,
) -> dict[str, float]:
    """The numbers that are read of a question, by name; `None` for what a gate does not read."""
    parts: list[tuple[str, tuple[str, ...], list[float]]] = [
        ("question", QUESTION_FEATURES, question_features(question, reading))
    ]
    if context is not None:
        parts.append(("context", CONTEXT_FEATURES, context_features(question, context, reading)))
    if history is not None:
        parts.append(("conversation", HISTORY_FEATURES, history_features(question, history)))
    if steps:
        parts.append(("results", STATE_FEATURES, state_features(question, history or "")))
    return {
        f"{of}: {name.replace('_', ' ')}": float(value)
        for of, names, values in parts
        for name, value in zip(names, values, strict=True)
    }


def draft_text_features(question: str, draft: str, reading: int = READING) -> dict[str, float]:
    """What the text of a direct draft shows, by the names of `DRAFT_TEXT_FEATURES`."""
    words = spoken(draft, reading)
    asked = set(spoken(question, reading))
    values = (
        math.log1p(len(words)),
        any(character.isdigit() for character in draft),
        sum(word in asked for word in words) / max(1, len(words)),
        (draft if reading == 1 else canonical(draft)).strip().endswith("."),
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


def spaces_of(
    question: str, *, history: str | None, context: str | None, draft: str | None, reading: int = READING
) -> dict[str, Mapping[int, int]]:
    """Counts by bucket, by the names of `SPACES`; `None` for what a gate does not read."""
    words, skeleton = hashed_ngrams(question, reading=reading)
    spaces = {"w": words, "s": skeleton}
    if history is not None:
        spaces["h"] = hashed_conversation(question, history)
    if context is not None:
        spaces["c"] = hashed_words("c", context)
    if draft is not None:
        spaces["d"] = hashed_words("d", draft)
    return spaces


def weighed(spaces: Mapping[str, Mapping[int, int]], idf: Sequence[float]) -> list[tuple[int, float]]:
    """(bucket, value): sublinear counts times `idf`, each space scaled to its length in `SPACES`.

    Args:
        spaces: As `spaces_of` gives them.
        idf: [BUCKETS], 0 where the n-gram was too rare in training to count.
    """
    vector: list[tuple[int, float]] = []
    for name, counts in spaces.items():
        values = [
            (bucket, (1.0 + math.log(count)) * idf[bucket] if count > 1 else idf[bucket])
            for bucket, count in counts.items()
            if idf[bucket] > 0
        ]
        norm = math.sqrt(sum([value * value for _, value in values]))
        vector += [(bucket, SPACES[name] * value / norm) for bucket, value in values]
    return vector


def _answer_words(answer: str) -> set[str]:
    words = {word.rstrip(".,").replace(",", "") for word in _ANSWER_WORD.findall(answer[:LONGEST].lower())}
    return words - _STOP or words


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
            self._history = bool(policy.get("history"))
            self._steps = bool(policy.get("steps"))
            self._context_words, self._draft_words = (bool(policy.get(f"{it}_words")) for it in ("context", "draft"))
            self._reading = reading_of(artefact)
            self._draft: tuple[str, ...] = tuple(policy["draft"])
            self._log = frozenset(policy["log"])
            self._missing: list[int] = list(policy["missing"])
            self._weight, self._clip = float(policy["number_weight"]), float(policy["clip"])
            self._idf = tensors["idf"].values
            self._mean, self._scale = tensors["number_mean"].values, tensors["number_scale"].values
            self._bias = tensors["bias"].values
            heads = range(artefact.heads)
            self._text = [tensors["text_weights"].row(head) for head in heads]
            self._numbers = [tensors["number_weights"].row(head) for head in heads]
            if tensors["text_weights"].shape[0] != len(heads) or tensors["number_weights"].shape[0] != len(heads):
                raise ValueError(f"weights for other heads than {len(heads)}")
            self._check(artefact)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(f"{str(artefact.folder)!r} lacks a part: {error!r}; export it again.") from error

    def _check(self, artefact: Artefact) -> None:
        read = len(QUESTION_FEATURES) + len(self._draft)
        read += self._context * len(CONTEXT_FEATURES) + self._history * len(HISTORY_FEATURES)
        read += self._steps * len(STATE_FEATURES)
        width, heads = read + len(self._missing), artefact.heads
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
        spaces = spaces_of(
            asked.question,
            history=asked.history if self._history else None,
            context=asked.context if self._context_words else None,
            draft=asked.draft_text if self._draft_words else None,
            reading=self._reading,
        )
        vector = weighed(spaces, self._idf)
        numbers = self._inputs(asked)
        return [
            bias
            + sum([text[bucket] * value for bucket, value in vector])
            + sum([weight * value for weight, value in zip(weights, numbers, strict=True)])
            for bias, text, weights in zip(self._bias, self._text, self._numbers, strict=True)
        ]

    def _inputs(self, asked: Asked) -> list[float]:
        raw = question_features(asked.question, self._reading)
        if self._context:
            raw += context_features(asked.question, asked.context, self._reading)
        if self._history:
            raw += history_features(asked.question, asked.history)
        if self._steps:
            raw += state_features(asked.question, asked.history)
        first_draft = len(raw)
        raw += [(asked.draft or {}).get(name, math.nan) for name in self._draft]
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
