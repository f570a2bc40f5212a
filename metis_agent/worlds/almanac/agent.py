"""The almanac's agent and its tools: what `metis ask` and LangGraph Studio run where nobody names a model.

No key, no network, no download: the packaged cold start, the real Python sandbox and the real text search. Each
question stands alone, since the tiny model has never seen a conversation.

In training the world's noise stands in front: a small share of calls come back wrong or fail, as tools in the world do.
So a needless call costs accuracy as well as time; most of the accuracy that economy wins in this world comes from here,
by construction. Where users ask, the tools never lie.

The world of two hops has an agent whose model is written down rather than trained: what it knows by heart is known, and
so is what each of its calls is worth. It searches on for one or two calls after it has enough.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolCall, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool, ToolException

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate, SupportsDecide
from metis_agent.messages import turn_of
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.worlds.almanac.facts import (
    COUNTRIES,
    PLACES,
    RUMOURS,
    entries,
    linked_entries,
    place,
    places_by_name,
    sister_of,
)
from metis_agent.worlds.almanac.questions import by_heart

if TYPE_CHECKING:
    from metis_agent.models.local import LocalChatModel

__all__ = [
    "COLD_START",
    "ERROR",
    "EXAMPLES",
    "Noise",
    "NoisyTool",
    "SeekingModel",
    "almanac_agent",
    "almanac_model",
    "almanac_search",
    "almanac_tools",
    "seeking_agent",
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


def almanac_search(*, linked: bool = False) -> TextSearchTool:
    """Text search over the almanac: one short entry, and no label, since the tiny model reads few tokens.

    Args:
        linked: Each place's entry names its sister town.
    """
    return TextSearchTool(
        backend=_corpus(linked), limit=1, label="", template="{text}", no_results="No results.",
        metadata={"read_only": True},
    )  # fmt: skip


@cache
def _corpus(linked: bool) -> CorpusSearch:
    texts = linked_entries() if linked else entries()
    return CorpusSearch.build([Document(id=name, title=name, text=text) for name, text in texts.items()])


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
    from metis_agent.models.local import LocalChatModel

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


class SeekingModel(BaseChatModel):
    """Knows greetings, sums, popular facts and a few sister towns; looks up the rest, and then looks further.

    What it says depends on the conversation alone.
    """

    offers_tools_when_direct: ClassVar[bool] = False
    """Without tools beside it, it takes a conversation that holds calls."""
    slips: float = 0.01
    """Share of answers that are wrong for no reason."""

    @property
    def _llm_type(self) -> str:
        return "seeking"

    def bind_tools(self, tools: Sequence[Any], **options: Any) -> Runnable[Any, AIMessage]:
        """With tools it searches, without it answers."""
        return self.bind(tools=tools, **{**options, "tool_choice": options.get("tool_choice")})

    def _generate(self, messages: list[BaseMessage], *_: Any, **options: Any) -> ChatResult:
        search = options.get("tool_choice") != "none" and bool(options.get("tools"))
        return ChatResult(generations=[ChatGeneration(message=self.reply(messages, search=search))])

    def reply(self, messages: list[BaseMessage], *, search: bool) -> AIMessage:
        """What it says after a conversation: a call where it may search and has not had enough, else an answer."""
        turn = turn_of(messages)
        question, results = str(turn[0].text), [str(it.text) for it in turn if isinstance(it, ToolMessage)]
        more = 1 + _draw(question, "more") % 2
        if not search or len(results) >= len(_to_look_up(question)) + more:
            return AIMessage(self._answer(question, results))
        call = ToolCall(name="text_search", args={"query": _query(question, results)}, id=f"search {len(results)}")
        return AIMessage("", tool_calls=[call])

    def _answer(self, question: str, results: Sequence[str]) -> str:
        needed = len(_to_look_up(question))
        slips = _draw(question, f"slips {len(results)}") % 10_000 < 10_000 * self.slips
        if slips or len(results) < needed:
            it = place(_draw(question, f"guess {len(results)}") % PLACES)
            return it.river if "river" in question else str(it.founded)
        if needed:
            pattern = r"river (\w+)" if "river" in question else r"founded in (\d+)"
            found = re.search(pattern, results[needed - 1])
            return found[1] if found else "I don't know."
        if question in by_heart():
            return by_heart()[question]
        return str(sum(map(int, re.findall(r"\d+", question))))


def seeking_agent(gate: Gate | SupportsDecide | None = None) -> MetisAgent:
    """The agent of the world of two hops (`questions.CALLS_NEEDED`), which never has enough.

    Args:
        gate: As in `create_metis_agent`.
    """
    return create_metis_agent(SeekingModel(), [almanac_search(linked=True)], gate=gate, budget=Budget(calls=6))


def _to_look_up(question: str) -> tuple[str, ...]:
    """Names of the places whose entries tell the answer, as far as they are known before the first search."""
    names = [word for word in re.findall(r"[A-Z]\w+", question) if word in places_by_name()]
    if not names:
        return ()
    index = places_by_name()[names[0]]
    if "sister town" not in question:
        return (place(index).name,)
    return (place(sister_of(index)).name,) if index < RUMOURS else (place(index).name, "its sister town")


def _query(question: str, results: Sequence[str]) -> str:
    """What to search for next: the place asked about, then one sister town after the other."""
    places = _to_look_up(question)
    if not results:
        return places[0] if places else question
    found = re.search(r"sister town is (\w+)", results[-1])
    return found[1] if found else f"{question} ({len(results)})"


def _draw(question: str, what: str) -> int:
    """A number that is the same for the same question. (A checksum's numbers for like texts depend on each other.)"""
    return int.from_bytes(hashlib.blake2b(f"{question} {what}".encode(errors="surrogatepass"), digest_size=8).digest())
