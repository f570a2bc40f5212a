"""Tool noise: a small share of calls come back wrong or fail, as tools in the world do.

So a needless call costs accuracy as well as time; most of the accuracy that economy wins in this world
comes from here, by construction.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from metis_agent.worlds.almanac.facts import COUNTRIES, PLACES, place

__all__ = ["ERROR", "Noise"]

ERROR = "Error: the service is not available."


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How often a tool call goes wrong."""

    wrong: float = 0.08
    """Share of calls whose result is replaced by a plausible wrong one."""
    error: float = 0.01
    """Share of calls that fail."""

    def apply(self, content: str, rng: random.Random) -> str | None:
        """The content, perhaps spoiled; `None` where the call is to fail."""
        chance = rng.random()
        if chance < self.error:
            return None
        return _spoil(content, rng) if chance < self.error + self.wrong else content


def _spoil(content: str, rng: random.Random) -> str:
    """Another entry's values under the same name, or another digit in a number."""
    if " was founded in " in content:
        other = place(rng.randrange(PLACES))
        content = re.sub(r"founded in \d+", f"founded in {other.founded}", content)
        return re.sub(r"on the river \w+", f"on the river {other.river}", content)
    if "; its capital is " in content:
        other_country = rng.choice(COUNTRIES)
        content = re.sub(r" is in \w+", f" is in {other_country.continent}", content)
        content = re.sub(r"capital is \w+", f"capital is {other_country.capital}", content)
        return re.sub(r"money the \w+", f"money the {other_country.currency}", content)
    digits = [match.start() for match in re.finditer(r"\d", content)]
    if not digits:
        return content
    position = rng.choice(digits)
    digit = rng.choice([d for d in "123456789" if d != content[position]])
    return content[:position] + digit + content[position + 1 :]
