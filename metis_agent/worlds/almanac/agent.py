"""The almanac's agent and its tools: what `metis ask` and LangGraph Studio run where nobody names a model.

No key, no network, no download: the packaged cold start, the real Python sandbox and the real text search. Each
question stands alone, since the tiny model has never seen a conversation.

In training the world's noise stands in front: a small share of calls come back wrong or fail, as tools in the world do.
So a needless call costs accuracy as well as time; most of the accuracy that economy wins in this world comes from here,
by construction. Where users ask, the tools never lie.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from langchain_core.messages import ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate, SupportsDecide
from metis_agent.models.local import LocalChatModel
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.worlds.almanac.facts import COUNTRIES, PLACES, entries, place

__all__ = [
    "COLD_START",
    "ERROR",
    "EXAMPLES",
    "Noise",
    "NoisyTool",
    "almanac_agent",
    "almanac_model",
    "almanac_search",
    "almanac_tools",
]

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


_READABLE = 80
"""Characters of a result that the tiny model is given."""


class NoisyTool(BaseTool):
    """A tool in front of another that now and then spoils its result or fails.

    What happens depends on the run's seed (`configurable.seed`) and the arguments alone, so it can be repeated.
    """

    inner: BaseTool
    noise: Noise
    handle_tool_error: bool = True

    def _run(self, config: RunnableConfig, **arguments: Any) -> str:
        return self._spoil(self.inner.invoke(self._call(arguments), config), config, arguments)

    async def _arun(self, config: RunnableConfig, **arguments: Any) -> str:
        return self._spoil(await self.inner.ainvoke(self._call(arguments), config), config, arguments)

    def _call(self, arguments: dict[str, Any]) -> ToolCall:
        return ToolCall(type="tool_call", id="inner", name=self.inner.name, args=arguments)

    def _spoil(self, message: ToolMessage, config: RunnableConfig, arguments: dict[str, Any]) -> str:
        seed = config.get("configurable", {}).get("seed")
        rng = random.Random(f"{seed} {self.name} {arguments}") if seed is not None else random.Random()
        content = self.noise.apply(message.text, rng)
        if content is None:
            raise ToolException(ERROR)
        if message.status == "error":
            raise ToolException(_last_line(message.text))
        return content[:_READABLE]


def _last_line(traceback: str) -> str:
    """What went wrong, without where: more would not fit into the tiny model."""
    lines = [line for line in traceback.splitlines() if re.match(r"\w+(Error|Exception|Interrupt)\b", line)]
    return (lines or [ERROR])[-1][:_READABLE]


def almanac_search() -> TextSearchTool:
    """Text search over the almanac: one short entry, and no label, since the tiny model reads few tokens."""
    documents = [Document(id=name, title=name, text=text) for name, text in entries().items()]
    return TextSearchTool(
        backend=CorpusSearch.build(documents), limit=1, label="", template="{text}", no_results="No results."
    )


def almanac_tools(*, noise: Noise = Noise()) -> tuple[BaseTool, ...]:
    """`python` and `text_search`, as the almanac's agent is given them."""
    return tuple(
        NoisyTool(
            name=tool.name,
            description=tool.description,
            args_schema=tool.args_schema,
            inner=tool,
            noise=noise,
        )
        for tool in (PythonTool(images=False), almanac_search())
    )


COLD_START = Path(str(files("metis_agent.worlds.almanac") / "weights"))
"""The trained cold start that the package ships."""

EXAMPLES = ("hi", "What is 21 + 34?", "What is 4821 * 7310?", "What is the capital of France?")
"""Questions of the kinds that the tiny model understands."""

_REPLY = 24
"""Tokens; the longest reply that is of use has 14."""


def almanac_model() -> LocalChatModel:
    """The packaged cold start, greedy: it calls a tool on nearly every question, also where it knows the answer."""
    return LocalChatModel.load(COLD_START, model_name="almanac", max_new_tokens=_REPLY)


def almanac_agent(gate: Gate | SupportsDecide | None = None, *, model: LocalChatModel | None = None) -> MetisAgent:
    """The world's agent.

    Args:
        gate: As in `create_metis_agent`.
        model: Such as one trained by HDPO; by default the cold start.
    """
    tools = almanac_tools(noise=Noise(wrong=0.0, error=0.0))
    # Short refusals and few calls: the tiny model reads little.
    return create_metis_agent(
        model or almanac_model(), tools, gate=gate, budget=Budget(calls=2), block_message="Error.", name="metis"
    )
