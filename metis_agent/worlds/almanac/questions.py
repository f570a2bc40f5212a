"""The almanac's questions: five kinds, and a partially known one, each with train and held-out splits from a seed.

Known in the head: greetings, sums of two-digit numbers, popular facts.
Out of reach of it: products of four-digit numbers (Python), obscure facts (search).
Half-known: places of which the cold start has heard, and believes what it heard, right about one time in three.
Two hops: what is asked of a place's sister town, which has to be found first, unless it is known by heart.

What is held out never stands in training: pairs of numbers and obscure places by a hash, and of what has to be
learnt by heart (popular facts, greetings, hearsay) phrasings, by a hash of the words.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Literal

from metis_agent.errors import ConfigurationError
from metis_agent.types import Question
from metis_agent.worlds.almanac.facts import COUNTRIES, PLACES, RUMOURS, Place, place, sister_of

__all__ = [
    "CALLS_NEEDED",
    "KINDS",
    "KNOWN",
    "PARTIALLY_KNOWN",
    "Hop",
    "Kind",
    "Split",
    "by_heart",
    "draw",
    "follow_up",
    "phrasings",
    "questions",
]

Kind = Literal["greeting", "sum", "popular", "product", "obscure", "hearsay"]
Hop = Literal["sister", "known sister"]
"""Kinds whose answer stands in the entry of a place's sister town."""
Split = Literal["train", "validation", "test"]

KNOWN: tuple[Kind, ...] = ("greeting", "sum", "popular")
PARTIALLY_KNOWN: Kind = "hearsay"
KINDS: tuple[Kind, ...] = (*KNOWN, "product", "obscure")
"""The kinds of the ordinary world; `PARTIALLY_KNOWN` is added on request."""
CALLS_NEEDED: Mapping[Kind | Hop, int] = {
    "greeting": 0, "sum": 0, "popular": 0, "obscure": 1, "known sister": 1, "sister": 2,
}  # fmt: skip
"""The kinds of the world of two hops, and how many searches each needs. Of the places that one has heard of one knows
the sister town by heart."""

_HELD_OUT: dict[Split, range] = {"train": range(0, 70), "validation": range(70, 80), "test": range(80, 100)}


def questions(split: Split, count: int, *, seed: int = 0, kinds: Sequence[Kind | Hop] = KINDS) -> tuple[Question, ...]:
    """`count` distinct questions, the kinds in equal shares (the first kinds take the remainder).

    Raises:
        ConfigurationError: an unknown split or kind, or more questions asked for than a kind has.
    """
    if split not in _HELD_OUT:
        raise ConfigurationError(f"unknown split {split!r}; choose one of {', '.join(_HELD_OUT)}")
    unknown = [kind for kind in kinds if kind not in _MAKERS]
    if unknown or not kinds:
        raise ConfigurationError(f"unknown kinds {unknown!r}; choose from {', '.join(_MAKERS)}")
    found: list[Question] = []
    for position, kind in enumerate(kinds):
        share = count // len(kinds) + (position < count % len(kinds))
        found += _distinct(kind, split, share, random.Random(f"{split} {kind} {seed}"))
    random.Random(f"order {seed}").shuffle(found)
    return tuple(found)


def draw(kind: Kind | Hop, split: Split, rng: random.Random) -> Question:
    """One question of a kind, from a split."""
    make = _MAKERS[kind]
    while True:
        text, answer, key, *relation = make(rng)
        if zlib.crc32(key.encode()) % 100 in _HELD_OUT[split]:
            numeric = kind in ("sum", "product")
            return Question(
                id=f"{kind}: {text}", text=text, answer=answer, kind=kind,
                verifier="numeric" if numeric else "exact", metadata={"relation": relation[0]} if relation else {},
            )  # fmt: skip


def follow_up(question: Question) -> Question:
    """The same question as the second turn of a conversation, in words that say little without the first.

    Either the first turn asked the same of another name ("And Badoki?"), or something else of the same name ("And its
    river?"); sums and products go on with another number. Greetings stay as they are.

    Returns:
        The question, `metadata["history"]` holding the turn before as messages with "role" and "content".
    """
    rng = random.Random(f"follow-up {question.id}")
    relation = question.metadata.get("relation")
    if question.kind == "greeting":
        return question
    if relation is None:
        a, sign, b = _arithmetic(question.text)
        other = rng.randint(10, 99) if question.kind == "sum" else rng.randint(1000, 9999)
        before, said = f"What is {a} {sign} {other}?", str(int(a) + other if sign == "+" else int(a) * other)
        text = rng.choice(("And with {b}?", "And {b}?")).format(b=b)
    else:
        forms = _POPULAR_FORMS if relation in _POPULAR_FORMS else _OBSCURE_FORMS
        name = _name_in(question.text, forms[relation])
        if rng.random() < 0.5:
            other_name = draw(question.kind, "train", rng)  # type: ignore[arg-type]
            relations = [relation]
            subject, text = _name_in(other_name.text, forms[other_name.metadata["relation"]]), f"And {name}?"
        else:
            relations = [it for it in forms if it != relation]
            subject, text = name, f"And {_ELLIPSES[relation]}?"
        before = rng.choice(forms[rng.choice(relations)]).format(name=subject)
        said = "I have looked it up."
    history = [{"role": "user", "content": before}, {"role": "assistant", "content": said}]
    return replace(
        question, id=f"{question.id} (follow-up)", text=text, metadata={**question.metadata, "history": history}
    )


def phrasings() -> tuple[str, ...]:
    """Every form of question and every fixed reply, names and numbers left as `{name}`, `{a}` and `{b}`."""
    forms = [*_SUM_FORMS, *_PRODUCT_FORMS, _HELLO, _WELCOME]
    for by_relation in (_POPULAR_FORMS, _OBSCURE_FORMS):
        forms += [form for group in by_relation.values() for form in group]
    greetings = [word + tail for word, _ in _GREETINGS for tail in _GREETING_TAILS]
    return tuple(forms + greetings + [text[0].upper() + text[1:] for text in greetings])


@cache
def by_heart() -> dict[str, str]:
    """The answers to all greetings and questions about popular facts."""
    known = {
        form.format(name=country.name): str(getattr(country, relation))
        for relation, forms in _POPULAR_FORMS.items()
        for form in forms
        for country in COUNTRIES
    }
    for word, reply in _GREETINGS:
        for text in (word + tail for tail in _GREETING_TAILS):
            known[text] = known[text[0].upper() + text[1:]] = reply
    return known


def _distinct(kind: Kind | Hop, split: Split, count: int, rng: random.Random) -> Iterator[Question]:
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        question = draw(kind, split, rng)
        if question.id in seen:
            misses += 1
            if misses > 1_000:
                raise ConfigurationError(
                    f"{count} distinct {kind!r} questions were asked of the {split!r} split, which has only "
                    f"about {len(seen)}; ask for fewer, or leave the kind out"
                )
            continue
        misses = 0
        seen.add(question.id)
        yield question


_Made = tuple[str, ...]  # text, answer, the key that is hashed into a split, and for facts the relation


def _sum(rng: random.Random) -> _Made:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    form = rng.choice(_SUM_FORMS)
    return form.format(a=a, b=b), str(a + b), f"{min(a, b)}+{max(a, b)}"


def _product(rng: random.Random) -> _Made:
    a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
    form = rng.choice(_PRODUCT_FORMS)
    return form.format(a=a, b=b), str(a * b), f"{min(a, b)}*{max(a, b)}"


def _popular(rng: random.Random) -> _Made:
    country = rng.choice(COUNTRIES)
    relation = rng.choice(tuple(_POPULAR_FORMS))
    text = rng.choice(_POPULAR_FORMS[relation]).format(name=country.name)
    return text, getattr(country, relation), text, relation


def _obscure(rng: random.Random) -> _Made:
    it = place(rng.randrange(RUMOURS, PLACES))
    text, relation = _about(it, rng)
    return text, str(getattr(it, relation)), it.name, relation


def _hearsay(rng: random.Random) -> _Made:
    it = place(rng.randrange(RUMOURS))
    text, relation = _about(it, rng)
    return text, str(getattr(it, relation)), text, relation


def _sister(rng: random.Random, *, known: bool = False) -> _Made:
    index = rng.randrange(RUMOURS) if known else rng.randrange(RUMOURS, PLACES)
    it, sister = place(index), place(sister_of(index))
    text, relation = _about(it, rng, "the sister town of {name}")
    return text, str(getattr(sister, relation)), text if known else it.name, relation


def _about(it: Place, rng: random.Random, called: str = "{name}") -> tuple[str, str]:
    relation = rng.choice(tuple(_OBSCURE_FORMS))
    return rng.choice(_OBSCURE_FORMS[relation]).format(name=called.format(name=it.name)), relation


def _greeting(rng: random.Random) -> _Made:
    word, reply = rng.choice(_GREETINGS)
    text = word + rng.choice(_GREETING_TAILS)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    # The bare words are what people type first, so they are always learnt from.
    return text, reply, text if text.lower() != word else _LEARNT


def _arithmetic(text: str) -> tuple[str, str, str]:
    a, b = re.findall(r"\d+", text)
    return a, "*" if "*" in text or text.startswith("Multiply") else "+", b


def _name_in(text: str, forms: Sequence[str]) -> str:
    for form in forms:
        before, _, after = form.partition("{name}")
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    raise ConfigurationError(f"{text!r} is no question of the almanac about a name")


_SUM_FORMS = ("What is {a} + {b}?", "{a} + {b}", "Add {a} and {b}.")
_PRODUCT_FORMS = ("What is {a} * {b}?", "{a} * {b}", "Multiply {a} by {b}.")
_POPULAR_FORMS = {
    "capital": (
        "What is the capital of {name}?", "Which city is the capital of {name}?", "Name the capital of {name}.",
        "The capital of {name}?", "What is the capital city of {name}?",
    ),
    "currency": (
        "What is the currency of {name}?", "Which currency is used in {name}?", "Name the currency of {name}.",
        "The currency of {name}?", "What is the money of {name}?",
    ),
    "continent": (
        "Which continent is {name} on?", "What is the continent of {name}?", "Name the continent of {name}.",
        "The continent of {name}?", "On which continent is {name}?",
    ),
}  # fmt: skip
_OBSCURE_FORMS = {
    "founded": (
        "When was {name} founded?",
        "In which year was {name} founded?",
        "What year was {name} founded in?",
        "Name the year {name} was founded.",
    ),
    "river": (
        "Which river does {name} lie on?",
        "What is the river of {name}?",
        "Name the river of {name}.",
        "On which river is {name}?",
    ),
}
_ELLIPSES = {
    "capital": "its capital", "currency": "its currency", "continent": "the continent",
    "founded": "when was it founded", "river": "the river",
}  # fmt: skip
_LEARNT = "a bare greeting"  # hashes into train
_HELLO = "Hello! How can I help?"
_WELCOME = "You are welcome!"
_GREETINGS = (
    ("hi", _HELLO), ("hello", _HELLO), ("hey", _HELLO), ("howdy", _HELLO), ("good morning", _HELLO),
    ("good afternoon", _HELLO), ("good evening", _HELLO), ("good day", _HELLO), ("greetings", _HELLO),
    ("thanks", _WELCOME), ("thank you", _WELCOME), ("many thanks", _WELCOME),
)  # fmt: skip
_GREETING_TAILS = (
    "", "!", ".", " there", " there!", " Metis", " Metis!", " again", " again!", " friend", " friend!",
    " my friend", " my friend!", " everyone", " everyone!", ", Metis", ", Metis!", ", friend", ", friend!",
    " dear Metis", " dear Metis!", " dear friend", " dear friend!", " and welcome", " so much", " so much!",
)  # fmt: skip

_MAKERS: dict[Kind | Hop, Callable[[random.Random], _Made]] = {
    "greeting": _greeting,
    "sum": _sum,
    "popular": _popular,
    "product": _product,
    "obscure": _obscure,
    "hearsay": _hearsay,
    "sister": _sister,
    "known sister": partial(_sister, known=True),
}
