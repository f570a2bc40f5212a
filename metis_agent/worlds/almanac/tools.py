"""The almanac's tools: the real Python sandbox and the real text search, with the world's noise in front."""

from __future__ import annotations

import random
import re
from typing import Any

from langchain_core.messages import ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException

from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.worlds.almanac.facts import entries
from metis_agent.worlds.almanac.noise import ERROR, Noise

__all__ = ["NoisyTool", "almanac_search", "almanac_tools"]


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
