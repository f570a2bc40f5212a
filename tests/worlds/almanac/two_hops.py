"""Recorded runs of several calls, made from the almanac's facts: what an agent that never has enough has done.

Every place has a sister town, which the almanac's entry names. "When was the sister town of Badoki founded?" needs two
searches; of the places that the agent has heard of it knows the sister by heart, and needs one. Sums, greetings and
popular facts need none. The agent searches on for one or two calls after it has enough, and one verdict in a hundred
is by chance.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from metis_agent.gates.reading import observed
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.worlds.almanac.facts import PLACES, RUMOURS, Place, place
from metis_agent.worlds.almanac.questions import Split, draw

_CHANCE = 0.01
_FORMS = (
    "When was the sister town of {name} founded?",
    "In which year was the sister town of {name} founded?",
    "Which river does the sister town of {name} lie on?",
    "On which river is the sister town of {name}?",
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recorded run."""

    id: str
    question: str
    brought: tuple[tuple[str, str, bool], ...]
    """What each of its K calls brought."""
    verdicts: tuple[bool, ...]
    """a_0 .. a_K."""
    needed: int
    """Calls after which it has enough."""


def _sister(it: int) -> int:
    return (it * 7 + 13) % PLACES


def _entry(it: Place, sister: Place) -> str:
    return f"{it.entry[:-1]}; its sister town is {sister.name}."


def record(split: Split, number: int, seed: int) -> Run:
    """One run; places that are not known by heart are other ones in other splits."""
    rng = random.Random(f"{split} {number} {seed}")
    kind = rng.choice(("greeting", "sum", "popular", "obscure", "obscure", "two hops", "two hops", "half by heart"))
    searches: list[str] = []
    if kind in ("greeting", "sum", "popular"):
        question, needed = draw(kind, split, rng).text, 0  # type: ignore[arg-type]
        searches = ["No results."] * 2
    elif kind == "obscure":
        question, needed = draw("obscure", split, rng).text, 1
        name = next(word for word in re.findall(r"[A-Z]\w+", question) if word in _NAMES)
        searches = _searched(_NAMES[name], 2, rng)
    else:
        known = kind == "half by heart"
        spans = {"train": (RUMOURS, 4000), "validation": (4000, 4500), "test": (4500, PLACES)}
        first = rng.randrange(RUMOURS) if known else rng.randrange(*spans[split])
        question, needed = rng.choice(_FORMS).format(name=place(first).name), 1 if known else 2
        searches = _searched(_sister(first) if known else first, 2, rng)
    searches += [searches[-1]] * rng.randint(0, 1)
    verdicts = [(k >= needed) ^ (rng.random() < _CHANCE) for k in range(len(searches) + 1)]
    return Run(
        id=f"{split}/{number}", question=question, needed=needed, verdicts=tuple(verdicts),
        brought=tuple(("text_search", text, False) for text in searches),
    )  # fmt: skip


def records(split: Split, count: int, seed: int) -> list[Run]:
    """So many runs, each of another question."""
    found: dict[str, Run] = {}
    number = 0
    while len(found) < count:
        run = record(split, number, seed)
        found.setdefault(run.question, run)
        number += 1
    return list(found.values())


def _searched(first: int, calls: int, rng: random.Random) -> list[str]:
    chain = [first]
    while len(chain) <= calls:
        chain.append(_sister(chain[-1]))
    return [_entry(place(one), place(other)) for one, other in pairwise(chain)]


_NAMES = {place(index).name: index for index in range(PLACES)}


def decision_points(runs: list[Run]) -> OutcomeTable:
    """Their states but the last: what stopping gave, what going on gave, and what was left to pay for."""
    rows = [(run, k) for run in runs for k in range(len(run.brought))]
    return OutcomeTable(
        questions=tuple(run.question for run, _ in rows),
        actions=("direct", "text_search"),
        correct=np.array([[run.verdicts[k], run.verdicts[-1]] for run, k in rows], dtype=float),
        cost=np.array([[0.0, len(run.brought) - k] for run, k in rows]),
        seconds=np.full((len(rows), 2), np.nan),
        runs=tuple(run.id for run, _ in rows),
        observations=tuple(observed(run.brought[:k]) for run, k in rows),
    )
