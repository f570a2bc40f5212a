"""Which tool calls of a recorded run changed its outcome, and what each call cost.

Pure: verdicts in, labels out. A run visits states s_0 .. s_K, one before each round of tool calls and one after the
last. The verdict a_k says whether the model, asked to commit itself at s_k, would have done as well as the run did:
given its answer, or made the acting call that the run went on to make.

- k* is the first k with a_k = 1. Calls after it are *redundant*, those up to it *necessary*; without it the run is
  *lost* whatever it calls, and its calls are counted apart.
- A round with a_{k-1} = 1 and a_k = 0 is *harmful*: it took away what was right.
- A call that acts (books, mails, writes) is never redundant: its effect is its purpose. It ends a *stretch* of the
  run, and the calls after it are counted from there. A call of a tool of which nobody said what it does may act, so
  it is treated alike, and counted apart.

Costs are in dollars: by a price file of the user's own, then `genai-prices`, then unknown. An unknown price is never a
price of nothing: such tokens are counted and said to be unpriced.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metis_agent.errors import ConfigurationError, InputError

__all__ = [
    "Amount",
    "AuditedCall",
    "AuditedTurn",
    "Cost",
    "Effect",
    "ModelPrice",
    "Prices",
    "Use",
    "harmful_rounds",
    "stretches",
    "uses",
]

_PROVIDERS = {
    "azure_openai": "azure", "azure_ai": "azure", "bedrock": "aws", "bedrock_converse": "aws", "google_genai": "google",
    "google_vertexai": "google", "google_anthropic_vertex": "google", "mistralai": "mistral", "xai": "x-ai",
}  # fmt: skip
"""LangChain's names of providers, where `genai-prices` has another."""


class ModelPrice(BaseModel):
    """Dollars a million tokens."""

    model_config = ConfigDict(extra="forbid")

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    cache_read: float | None = Field(default=None, ge=0)
    """Input tokens that the provider had cached; as `input` where it isn't given."""


class _PriceFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    models: dict[str, ModelPrice] = {}
    tools: dict[str, float] = {}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars of one model call, by what it read and what it wrote."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Both."""
        return self.read + self.written


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of models and tools.

    Args:
        models: The user's own prices, by model name; they come first.
        tools: Dollars a call, by tool; they replace what tools declare.
    """

    models: Mapping[str, ModelPrice] = field(default_factory=dict)
    tools: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None, tools: Mapping[str, float] | None = None) -> Prices:
        """Prices from a .json or .toml file.

        It holds `models`, a table of name to `input`, `output` and `cache_read` in dollars a million tokens, and
        `tools`, a table of name to dollars a call.

        Args:
            path: The file; without one only `genai-prices` is asked.
            tools: Dollars a call; they come before the file's.

        Raises:
            ConfigurationError: the file can't be read, or holds something else.
        """
        if path is None:
            return cls(tools=dict(tools or {}))
        try:
            text = path.read_text("utf-8")
            parsed = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
            found = _PriceFile.model_validate(parsed)
        except (OSError, ValueError) as error:  # JSON, TOML and pydantic errors are ValueErrors
            said = _first_fault(error) if isinstance(error, ValidationError) else str(error)
            raise ConfigurationError(
                f'the price file {str(path)!r} can\'t be used: {said}. It holds {{"models": {{"NAME": {{"input": 1.25, '
                '"output": 10}}, "tools": {"NAME": 0.005}}: dollars a million tokens, and dollars a call.'
            ) from error
        return cls(models=found.models, tools={**found.tools, **(tools or {})})

    def of_call(self, model: str, usage: Mapping[str, int]) -> Cost | None:
        """Dollars of one model call, or `None` where the model's price is unknown.

        Args:
            model: Its name, with or without LangChain's name of the provider before a colon.
            usage: Tokens as LangChain counts them: `input_tokens` (cached ones included), `output_tokens`,
                `input_cache_read`, `input_cache_creation`.
        """
        _, _, bare = model.rpartition(":")
        own = self.models.get(model) or self.models.get(bare)
        read, written = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
        cached = min(usage.get("input_cache_read", 0), read)
        if own is not None:
            cheap = own.input if own.cache_read is None else own.cache_read
            dollars = (read - cached) * own.input + cached * cheap
            return Cost(read=dollars / 1e6, written=written * own.output / 1e6)
        return self._by_package(model, read, written, cached, usage.get("input_cache_creation", 0))

    def of_tool(self, tool: str, declared: float) -> float:
        """Dollars of one tool call."""
        return self.tools.get(tool, declared)

    def _by_package(self, model: str, read: int, written: int, cached: int, kept: int) -> Cost | None:
        if self._package is None or not model:
            return None
        provider, _, bare = model.rpartition(":")
        tokens = self._package.Usage(
            input_tokens=read, output_tokens=written, cache_read_tokens=cached, cache_write_tokens=kept
        )
        for provider_id in dict.fromkeys((_PROVIDERS.get(provider, provider) or None, None)):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self._package.calc_price(tokens, model_ref=bare, provider_id=provider_id)
            except (LookupError, ValueError):
                continue
            return Cost(read=float(found.input_price), written=float(found.output_price))
        return None

    @cached_property
    def _package(self) -> Any:
        try:
            import genai_prices
        except ImportError:
            return None
        return genai_prices


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"


Effect = Literal["reads", "acts", "unknown"]
"""What a tool does; only the calls of tools that read can be redundant."""

Use = Literal["redundant", "necessary", "lost", "acting", "undeclared", "undecided"]
"""What a call was for. "acting": it acts, or was made in the same breath as one that does. "undeclared": its tool's
effect is unknown. "undecided": a verdict that it hangs on is missing."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """What a call took; amounts add up."""

    dollars: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    """Tokens of the chat model, read and written, that the run would have done without."""
    unpriced: int = 0
    """Of these, tokens of a model whose price is unknown: they are not in `dollars`."""
    guessed: int = 0
    """Of these, tokens that were not recorded, and guessed from the length of the texts."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(
            dollars=self.dollars + other.dollars,
            seconds=self.seconds + other.seconds,
            tokens=self.tokens + other.tokens,
            unpriced=self.unpriced + other.unpriced,
            guessed=self.guessed + other.guessed,
        )


@dataclass(frozen=True, kw_only=True)
class AuditedCall:
    """One executed tool call."""

    tool: str
    effect: Effect = "reads"
    amount: Amount = field(default_factory=Amount)
    """What not making it would have saved: the tool's own cost, and its part of the model call that read its result."""


@dataclass(frozen=True, kw_only=True)
class AuditedTurn:
    """One turn of a conversation: its rounds of tool calls, and the verdicts on its states.

    Raises:
        InputError: there isn't one verdict for each state.
    """

    id: str
    rounds: tuple[tuple[AuditedCall, ...], ...]
    """K rounds; the calls of one round are made at once."""
    verdicts: tuple[bool | None, ...]
    """a_0 .. a_K; `None` where there is no verdict. Where the run itself acted it is right by definition, so what
    stands there is not read."""
    conversation: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        if len(self.verdicts) != len(self.rounds) + 1:
            raise InputError(
                f"turn {self.id!r} has {len(self.rounds)} rounds of calls and {len(self.verdicts)} verdicts; there is "
                "one verdict for each state: before every round, and after the last."
            )

    @property
    def group(self) -> str:
        """What is resampled as one: the conversation, or the turn where it has none."""
        return self.conversation or self.id

    @property
    def decided(self) -> bool:
        """False where a verdict is missing that a call of it hangs on."""
        return not any(use == "undecided" for labels in uses(self) for use in labels)


def reads_only(calls: Sequence[AuditedCall]) -> bool:
    """True for a round that could have been left out without leaving an effect out."""
    return all(call.effect == "reads" for call in calls)


def stretches(turn: AuditedTurn) -> Iterator[tuple[int, int]]:
    """(first, last) states of each stretch: within it calls only read, and at its last state the run committed itself.

    Example:
        >>> look, book = (AuditedCall(tool="look"),), (AuditedCall(tool="book", effect="acts"),)
        >>> turn = AuditedTurn(id="1", rounds=(look, book, look), verdicts=(True, None, True, True))
        >>> list(stretches(turn))
        [(0, 1), (2, 3)]
    """
    first = 0
    for state, calls in enumerate(turn.rounds):
        if not reads_only(calls):
            yield first, state
            first = state + 1
    yield first, len(turn.rounds)


def uses(turn: AuditedTurn) -> tuple[tuple[Use, ...], ...]:
    """What each call of each round was for."""
    found: list[tuple[Use, ...]] = []
    for first, last in stretches(turn):
        known = _verdicts(turn, first, last)
        enough = next((k for k, right in enumerate(known) if right), None)
        undecided = None in known[:enough]
        for k in range(last - first):
            use: Use = "redundant" if enough is not None and k >= enough else "necessary" if enough else "lost"
            found.append(("undecided" if undecided else use,) * len(turn.rounds[first + k]))
        if last < len(turn.rounds):
            found.append(tuple("undeclared" if call.effect == "unknown" else "acting" for call in turn.rounds[last]))
    return tuple(found)


def harmful_rounds(turn: AuditedTurn) -> tuple[bool, ...]:
    """For each round whether it took away a right answer: right before it, and wrong after."""
    found = [False] * len(turn.rounds)
    for first, last in stretches(turn):
        known = _verdicts(turn, first, last)
        for k in range(last - first):
            found[first + k] = known[k] is True and known[k + 1] is False
    return tuple(found)


def _verdicts(turn: AuditedTurn, first: int, last: int) -> tuple[bool | None, ...]:
    """Of a stretch; where the run acted it agrees with itself."""
    found = turn.verdicts[first : last + 1]
    return found if last == len(turn.rounds) else (*found[:-1], True)
