"""What is true in the almanac: popular facts that a model may know, obscure ones that it must look up.

Popular facts are real. Obscure places are invented, spelled in syllables, so that no model can know them;
each is derived from its index alone, so the almanac is the same on every machine. Of some places the cold start
has heard, and what it has heard is true two times in five: it is as sure of the rest, so it half-knows them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

__all__ = [
    "COUNTRIES",
    "PLACES",
    "RUMOURS",
    "SYLLABLES",
    "Country",
    "Place",
    "entries",
    "linked_entries",
    "place",
    "places_by_name",
    "sister_of",
]

PLACES = 6_000
"""How many obscure places the almanac describes."""

RUMOURS = 160
"""The first so many places are known from hearsay: the cold start learns values of them, most of them wrong."""

_TRUE = 0.42
"""Share of hearsay that is true; asked in words that it has not learnt from, the model recalls most of it."""

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeio")


@dataclass(frozen=True, kw_only=True)
class Country:
    """A country that everybody has heard of."""

    name: str
    capital: str
    currency: str
    continent: str

    @property
    def entry(self) -> str:
        """The almanac's text about it."""
        return f"{self.name} is in {self.continent}; its capital is {self.capital}, its money the {self.currency}."


@dataclass(frozen=True, kw_only=True)
class Place:
    """A village that only the almanac knows."""

    name: str
    founded: int
    river: str

    @property
    def entry(self) -> str:
        """The almanac's text about it."""
        return f"{self.name} was founded in {self.founded} and lies on the river {self.river}."

    def hearsay(self, relation: str) -> str:
        """What is said about it: a truth or another place's value, always the same."""
        draw = random.Random(f"hearsay {self.name} {relation}")
        source = self if draw.random() < _TRUE else place(draw.randrange(PLACES))
        return str(getattr(source, relation))


def place(index: int) -> Place:
    """The place with this index, 0 to `PLACES - 1`.

    The name is the index in base 56, scrambled by a multiplication that has an inverse, so names are distinct.
    """
    if not 0 <= index < PLACES:
        raise IndexError(f"place index {index!r} is outside 0 to {PLACES - 1}")
    base = len(SYLLABLES)
    code = (index * 104_729 + 31_337) % base**3
    digits = (code // base**2, code // base % base, code % base)
    draw = random.Random(f"almanac place {index}")
    return Place(
        name="".join(SYLLABLES[digit] for digit in digits).capitalize(),
        founded=draw.randint(1100, 1999),
        river="".join(draw.choices(SYLLABLES, k=2)).capitalize(),
    )


@cache
def entries() -> dict[str, str]:
    """The almanac: its text about each country and each place, by name."""
    countries = {country.name: country.entry for country in COUNTRIES}
    return countries | {it.name: it.entry for it in map(place, range(PLACES))}


@cache
def places_by_name() -> dict[str, int]:
    """The index of each place, by its name."""
    return {place(index).name: index for index in range(PLACES)}


def sister_of(index: int) -> int:
    """The index of a place's sister town, which only `linked_entries` tell of; each place is one other's."""
    return (index * 7 + 13) % PLACES


@cache
def linked_entries() -> dict[str, str]:
    """The almanac with the sister town of each place in its entry: a fact that leads to the next."""
    found = dict(entries())
    for name, index in places_by_name().items():
        found[name] = f"{found[name][:-1]}; its sister town is {place(sister_of(index)).name}."
    return found


def _countries(table: str) -> tuple[Country, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(
        Country(name=name, capital=capital, currency=currency, continent=continent)
        for name, capital, currency, continent in rows
    )


COUNTRIES = _countries("""
    France Paris euro Europe
    Germany Berlin euro Europe
    Italy Rome euro Europe
    Spain Madrid euro Europe
    Portugal Lisbon euro Europe
    Austria Vienna euro Europe
    Greece Athens euro Europe
    Finland Helsinki euro Europe
    Ireland Dublin euro Europe
    Norway Oslo krone Europe
    Denmark Copenhagen krone Europe
    Sweden Stockholm krona Europe
    Iceland Reykjavik krona Europe
    Poland Warsaw zloty Europe
    Hungary Budapest forint Europe
    Ukraine Kyiv hryvnia Europe
    Romania Bucharest leu Europe
    Albania Tirana lek Europe
    Serbia Belgrade dinar Europe
    Turkey Ankara lira Asia
    Japan Tokyo yen Asia
    China Beijing yuan Asia
    India Delhi rupee Asia
    Nepal Kathmandu rupee Asia
    Thailand Bangkok baht Asia
    Vietnam Hanoi dong Asia
    Mongolia Ulaanbaatar tugrik Asia
    Iran Tehran rial Asia
    Iraq Baghdad dinar Asia
    Jordan Amman dinar Asia
    Egypt Cairo pound Africa
    Kenya Nairobi shilling Africa
    Nigeria Abuja naira Africa
    Ghana Accra cedi Africa
    Morocco Rabat dirham Africa
    Tunisia Tunis dinar Africa
    Canada Ottawa dollar America
    Cuba Havana peso America
    Chile Santiago peso America
    Peru Lima sol America
    Colombia Bogota peso America
    Uruguay Montevideo peso America
    Australia Canberra dollar Oceania
""")
