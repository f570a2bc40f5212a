"""How the cold start is taught to behave: the call that a tool-happy model makes, and how it reads the result."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from functools import cache

from metis_agent.types import Question
from metis_agent.worlds.almanac.facts import RUMOURS, Place, entries, place
from metis_agent.worlds.almanac.noise import ERROR, Noise
from metis_agent.worlds.almanac.questions import HALF_KNOWN

__all__ = ["NOTHING", "UNKNOWN", "Call", "natural_call", "observe", "read", "recall"]

NOTHING = "No results."
UNKNOWN = "unknown"
"""What the model says when a tool leaves it without an answer."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call with one argument."""

    tool: str
    key: str
    value: str

    @property
    def wire(self) -> str:
        """As the model writes it."""
        arguments = json.dumps({self.key: self.value})
        return f'<tool_call>{{"name": "{self.tool}", "arguments": {arguments}}}</tool_call>'


def natural_call(question: Question) -> Call:
    """Numbers go to Python, names to the search, and a greeting is searched for too."""
    numbers = re.findall(r"\d+", question.text)
    if question.verifier == "numeric" and len(numbers) == 2:
        sign = "*" if question.kind == "product" else "+"
        return Call(tool="python", key="code", value=f"{numbers[0]}{sign}{numbers[1]}")
    words = re.findall(r"\w+", question.text)
    names = [word for word in words if word in entries()]
    return Call(tool="text_search", key="query", value=names[0] if names else words[0])


def observe(call: Call, noise: Noise, rng: random.Random) -> str:
    """What the tool will say, worked out without running it."""
    if call.tool == "text_search":
        content = entries().get(call.value, NOTHING)
    else:
        a, sign, b = re.split(r"([+*])", call.value)
        content = str(int(a) * int(b) if sign == "*" else int(a) + int(b))
    return noise.apply(content, rng) or ERROR


def recall(question: Question) -> str:
    """The answer that the model knows, or believes it knows, by heart."""
    if question.kind != HALF_KNOWN:
        return question.answer or ""
    it = next(_heard_of()[word] for word in re.findall(r"\w+", question.text) if word in _heard_of())
    return it.hearsay(question.metadata["relation"])


def read(question: Question, content: str) -> str:
    """The answer that the model reads off an observation."""
    if question.kind == "greeting":
        return question.answer or ""
    if content in (ERROR, NOTHING):
        return UNKNOWN
    if question.verifier == "numeric":
        return content
    found = re.search(_VALUES[question.metadata["relation"]], content)
    return found[1] if found else UNKNOWN


@cache
def _heard_of() -> dict[str, Place]:
    return {it.name: it for it in map(place, range(RUMOURS))}


_VALUES = {
    "founded": r"founded in (\d+)",
    "river": r"the river (\w+)",
    "capital": r"capital is (\w+)",
    "currency": r"money the (\w+)",
    "continent": r" is in (\w+)",
}
