"""Probes: the model is asked to answer now, at a state of a recorded run, from the recorded messages; no tool is run.

What the model said is kept on disk the moment it has been paid for, by the hash of what it was asked, so a killed audit
goes on where it was. The model reads exactly what the run had read. Tools that read are not offered; those that act
are, since the run may have been about to act, and what it would have called is as good as an answer. Providers refuse
a history with calls where no tools are given: there the definitions stand, and calls are forbidden.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from metis_agent.audit.accounting import Prices
from metis_agent.audit.turns import RecordedTurn, definition_of, tokens_of
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.sqlite import DiskCache, content_key

__all__ = ["DONE", "Probe", "ProbeEstimate", "ProbePoint", "Prober", "Probing", "TokenBucket"]

DONE = (
    "Could you answer my last message rightly and completely at once, from what is written above and what you know, "
    "without calling any more tools? Say only yes or no."
)
"""What a model is asked about itself, as the baseline that people would try."""

_FORMAT = 1
"""Of the question; part of the cache's key."""
_HOPELESS = 10
_FINAL = frozenset({400, 401, 403, 404, 413, 422})
"""HTTP statuses that another try does not mend."""


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """A state of a recorded turn, and what is asked there."""

    turn: RecordedTurn
    state: int
    ask: Literal["answer", "done"] = "answer"
    """To answer, or whether it could."""

    @property
    def name(self) -> tuple[str, int, str]:
        """Turn, state and what was asked."""
        return self.turn.run.id, self.state, self.ask


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the model said."""

    text: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of acting tools that it made instead of answering: `name` and `args`. They were not run."""
    usage: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def refused(self) -> bool:
        """True where it neither answered nor acted, such as by calling a tool that it was not to call."""
        return not self.text.strip() and not self.calls

    @property
    def says_yes(self) -> bool | None:
        """What it said to `DONE`; `None` where that was neither yes nor no."""
        word = self.text.strip().lstrip("*_\"'“").casefold()
        return True if word.startswith("yes") else False if word.startswith("no") else None


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How probes are made.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    concurrency: int = 8
    rate: float | None = None
    """Requests a minute at most."""
    attempts: int = 4
    seconds: float = 120.0
    """An attempt may take."""
    backoff: float = 2.0
    """Seconds before the second attempt; doubled each time."""
    budget: float | None = None
    """Dollars that may be spent; what was paid for before does not count."""
    system_prompt: str = ""
    """For runs whose record has none."""
    instruction: str = ""
    """A last message to the model, such as "Answer now."; none by default, as where a gate says "answer"."""

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1 or not self.seconds > 0 or self.backoff < 0:
            raise ConfigurationError(f"{self!r}: concurrency and attempts are at least 1, seconds above 0.")
        if (self.rate is not None and not self.rate > 0) or (self.budget is not None and self.budget < 0):
            raise ConfigurationError(f"rate={self.rate!r}, budget={self.budget!r}: above 0 a minute, and 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ProbeEstimate:
    """What probes will cost, before they are made."""

    probes: int
    """To be made; those that were paid for before are not."""
    cached: int
    read: int
    """Tokens."""
    written: int
    dollars: float | None
    """`None` where the model's price is unknown."""


class TokenBucket:
    """Lets so many a minute pass, evenly; what is not used is kept for a burst of one second.

    Args:
        rate: A minute.
        clock: Seconds.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._each, self._clock, self._sleep = 60.0 / rate, clock, sleep
        self._next = clock()

    async def take(self) -> None:
        """Wait for one's turn."""
        now = self._clock()
        self._next = max(self._next, now - 1.0)
        wait, self._next = self._next - now, self._next + self._each
        if wait > 0:
            await self._sleep(wait)


class Prober:
    """Asks one chat model.

    Args:
        model: A LangChain chat model; `None` only for an estimate.
        name: Its name: by it answers are kept, and priced.
        cache: Where answers are kept.
        probing: How it is asked.
        prices: Of the model.
    """

    def __init__(
        self,
        model: BaseChatModel | None,
        *,
        name: str,
        cache: DiskCache,
        probing: Probing = Probing(),
        prices: Prices = Prices(),
    ) -> None:
        self._model, self.name, self._cache, self._probing, self._prices = model, name, cache, probing, prices
        self.counts: Counter[str] = Counter()
        """Probes "asked" and "cached", "refused", "over budget", and failures by the name of their error."""
        self.spent = 0.0
        """Dollars, of probes asked by this object."""
        self.usage: Counter[str] = Counter()
        """Tokens read and written by probes, those from the cache included."""
        self.last_failure = ""
        if probing.budget is not None and prices.of_call(name, {"input_tokens": 1}) is None:
            raise ConfigurationError(
                f"budget={probing.budget!r} can't be kept: the price of {name!r} is unknown. Give it in a price file, "
                "or leave the budget out and see the tokens first."
            )

    def estimate(self, points: Iterable[ProbePoint]) -> ProbeEstimate:
        """What asking all of them will cost, from the tokens that the runs had recorded."""
        points = list(points)
        kept = self._cache.get_many([self._key(point) for point in points])
        missing = [point for point in points if self._key(point) not in kept]
        usages = [self._expected(point) for point in missing]
        costs = [self._prices.of_call(self.name, usage) for usage in usages]
        known = [cost.total for cost in costs if cost is not None]
        return ProbeEstimate(
            probes=len(missing),
            cached=len(points) - len(missing),
            read=sum(usage["input_tokens"] for usage in usages),
            written=sum(usage["output_tokens"] for usage in usages),
            dollars=sum(known) if len(known) == len(costs) else None,
        )

    async def ask(
        self, points: Sequence[ProbePoint], *, progress: Callable[[], None] = lambda: None
    ) -> dict[tuple[str, int, str], Probe]:
        """Ask at each point, in order, and return what was said; points without an answer are missing.

        Args:
            points: Each asked once, and never again where its answer is kept.
            progress: Called after each.

        Raises:
            InfrastructureError: so many failed in a row that nothing works; what was paid for is kept.
            ConfigurationError: it has no model.
        """
        if self._model is None:
            raise ConfigurationError(f"Prober(None, name={self.name!r}) can only estimate; give it a model to ask.")
        keys = {point.name: self._key(point) for point in points}
        kept = self._cache.get_many(keys.values())
        found: dict[tuple[str, int, str], Probe] = {}
        missing = []
        for point in points:
            if (value := kept.get(keys[point.name])) is None:
                missing.append(point)
            else:
                self._note(point, _from_json(value), found, "cached")
                progress()
        waiting = iter(missing)
        bucket = TokenBucket(self._probing.rate) if self._probing.rate else None
        reserved, in_a_row = 0.0, 0

        async def worker() -> None:
            nonlocal reserved, in_a_row
            for point in waiting:
                expected = self._prices.of_call(self.name, self._expected(point))
                price = expected.total if expected else 0.0
                if self._probing.budget is not None and self.spent + reserved + price > self._probing.budget:
                    self.counts["over budget"] += 1
                    progress()
                    continue
                reserved += price
                probe = await self._attempts(point, bucket)
                reserved -= price
                if probe is None:
                    in_a_row += 1
                    self._stop_where_hopeless(in_a_row)
                else:
                    in_a_row = 0
                    self._cache.put(keys[point.name], asdict(probe))
                    cost = self._prices.of_call(self.name, probe.usage)
                    self.spent += cost.total if cost else 0.0
                    self._note(point, probe, found, "asked")
                progress()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self._probing.concurrency, len(missing))):
                    tasks.create_task(worker())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return found

    def _note(self, point: ProbePoint, probe: Probe, found: dict[tuple[str, int, str], Probe], what: str) -> None:
        found[point.name] = probe
        self.counts[what] += 1
        self.counts["refused"] += probe.refused
        for key in ("input_tokens", "output_tokens"):
            self.usage[key] += probe.usage.get(key, 0)

    async def _attempts(self, point: ProbePoint, bucket: TokenBucket | None) -> Probe | None:
        failure = ""
        for attempt in range(self._probing.attempts):
            if attempt:
                await asyncio.sleep(min(60.0, self._probing.backoff * 2 ** (attempt - 1)))
            if bucket is not None:
                await bucket.take()
            started = time.perf_counter()
            try:
                async with asyncio.timeout(self._probing.seconds):
                    reply = await self._bound(point).ainvoke(self._messages(point))
            except Exception as error:  # each provider has exceptions of its own
                failure = type(error).__name__
                self.last_failure = f"{failure}: {error}"
                if getattr(error, "status_code", None) in _FINAL:
                    break
            else:
                return self._probe_of(point, reply, time.perf_counter() - started)
        self.counts[failure] += 1
        return None

    def _stop_where_hopeless(self, in_a_row: int) -> None:
        if in_a_row >= max(_HOPELESS, 2 * self._probing.concurrency):
            raise InfrastructureError(
                f"The last {in_a_row} probes of {self.name!r} failed, the last with {self.last_failure!r}. "
                f"{self.counts['asked']} answers are kept: once the cause is gone, run the same again to go on."
            )

    def _probe_of(self, point: ProbePoint, reply: BaseMessage, seconds: float) -> Probe:
        asked = reply.tool_calls if isinstance(reply, AIMessage) and point.ask == "answer" else []
        offered = {_name(definition) for definition in self._acting(point)}
        usage = {key: n for key, n in (getattr(reply, "usage_metadata", None) or {}).items() if isinstance(n, int)}
        if not usage:
            usage = self._expected(point) | {"output_tokens": tokens_of([reply])}
        return Probe(
            text=str(reply.text),
            calls=tuple({"name": call["name"], "args": call["args"]} for call in asked if call["name"] in offered),
            usage=usage,
            seconds=seconds,
        )

    def _messages(self, point: ProbePoint) -> list[BaseMessage]:
        messages = list(point.turn.steps[point.state].messages)
        if self._probing.system_prompt and not any(isinstance(message, SystemMessage) for message in messages):
            messages.insert(0, SystemMessage(self._probing.system_prompt))
        last = DONE if point.ask == "done" else self._probing.instruction
        return [*messages, HumanMessage(last)] if last else messages

    def _acting(self, point: ProbePoint) -> list[dict[str, Any]]:
        """Definitions of the tools that the model may call in this probe."""
        if point.ask == "done":
            return []
        return [dict(it) for it in point.turn.definitions if point.turn.effects.get(_name(it)) != "reads"]

    def _bound(self, point: ProbePoint) -> Any:
        model: Any = self._model
        acting = self._acting(point)
        try:
            if acting:
                return model.bind_tools(acting)
            if getattr(model, "offers_tools_when_direct", False) and point.turn.definitions:
                # A model that must be kept from writing calls of which nobody told it.
                return _without_calls(model, [dict(it) for it in point.turn.definitions])
            called = {
                call["name"]: definition_of(call["name"], call["args"])
                for message in point.turn.steps[point.state].messages
                if isinstance(message, AIMessage)
                for call in message.tool_calls
            }
            if not called:
                return model
            known = {_name(definition): definition for definition in point.turn.definitions}
            return _without_calls(model, [dict(it) for it in (called | known).values()])
        except NotImplementedError:  # a model that knows of no tools
            return model

    def _expected(self, point: ProbePoint) -> dict[str, int]:
        """Tokens that a probe will take: it reads what the run's own call read, and writes as much as its answer."""
        usage, _ = point.turn.usage_at(point.state)
        answer, _ = point.turn.usage_at(len(point.turn.steps) - 1)
        read = {key: count for key, count in usage.items() if key == "input_tokens"}
        if point.ask == "done":
            return {"input_tokens": read["input_tokens"] + 40, "output_tokens": 2}
        return {**read, "output_tokens": max(1, answer.get("output_tokens", 0))}

    def _key(self, point: ProbePoint) -> str:
        messages = [
            [
                message.type,
                message.content,
                getattr(message, "tool_calls", None),
                getattr(message, "tool_call_id", None),
            ]
            for message in self._messages(point)
        ]
        return content_key("probe", _FORMAT, self.name, messages, self._acting(point))


def _without_calls(model: BaseChatModel, definitions: list[dict[str, Any]]) -> Any:
    """The model with tools that it may not call."""
    forbidden: Any = {"type": "none"} if "anthropic" in type(model).__module__ else "none"
    return model.bind_tools(definitions, tool_choice=forbidden)


def _name(definition: Mapping[str, Any]) -> str:
    return str(definition["function"]["name"])


def _from_json(value: Mapping[str, Any]) -> Probe:
    return Probe(**{**value, "calls": tuple(value.get("calls", ()))})
