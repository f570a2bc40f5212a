"""Recorded runs as the audit reads them: which turns count, a fair sample of them, and what each of their calls took.

First step of the audit. A store is read once, turn by turn; only the sample is kept, so memory is bounded by it. What
does not count is counted with the reason.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from metis_agent.audit.accounting import Amount, AuditedCall, AuditedTurn, Effect, Prices
from metis_agent.errors import ConfigurationError, InputError
from metis_agent.traces.threads import Step, steps_of
from metis_agent.types import Trajectory, declared_read_only

__all__ = ["RecordedTurn", "Survey", "ToolEffects", "definition_of", "matched", "survey", "tokens_of"]

_CHARACTERS_A_TOKEN = 4
ALL = "*"


@dataclass(frozen=True, kw_only=True)
class ToolEffects:
    """Which tools only read, and which act: what is said here, then what a tool declares of itself.

    A tool declares it by `metadata={"read_only": True}`, or by MCP's annotation `readOnlyHint`.

    Raises:
        ConfigurationError: a tool is named as both.
    """

    reads: Collection[str] = ()
    """Names, and patterns such as "get_*"; "*" for all that aren't in `acts`."""
    acts: Collection[str] = ()
    """The same. A name goes before a pattern, a pattern before what a tool declares; of two, that of `acts` holds."""

    def __post_init__(self) -> None:
        if both := sorted(set(self.reads) & set(self.acts)):
            raise ConfigurationError(f"{both!r} are named as tools that read and as tools that act: decide for one.")

    def of(self, tool: str, definitions: Iterable[Mapping[str, Any]] = ()) -> Effect:
        """What a tool does, given the definitions that were offered."""
        if tool in self.acts:
            return "acts"
        if tool in self.reads:
            return "reads"
        if matched(self.acts, tool):
            return "acts"
        if matched(self.reads, tool):
            return "reads"
        declared = next((_declared(it) for it in definitions if _name(it) == tool), None)
        if declared is not None:
            return "reads" if declared else "acts"
        return "reads" if ALL in self.reads else "acts" if ALL in self.acts else "unknown"


def matched(given: Iterable[str], *tools: str) -> list[str]:
    """Return which of these names and patterns, "*" apart, are those of a tool."""
    return [it for it in given if it != ALL and any(tool == it or fnmatchcase(tool, it) for tool in tools)]


@dataclass(frozen=True, kw_only=True)
class RecordedTurn:
    """One recorded turn with the states that it visited."""

    run: Trajectory
    steps: tuple[Step, ...]
    """s_0 .. s_K."""
    effects: Mapping[str, Effect]
    """Of the tools that it called or was offered."""
    definitions: tuple[Mapping[str, Any], ...] = ()
    """Of the tools that it was offered, as OpenAI's API takes them; where the record has none, of those that were
    called anywhere in the store, as far as the calls show them."""

    @cached_property
    def rounds(self) -> tuple[tuple[str, ...], ...]:
        """Names of the tools that each of the K rounds executed."""
        return tuple(
            tuple(outcome.tool for outcome in step.round.outcomes if outcome.executed) if step.round else ()
            for step in self.steps[:-1]
        )

    @property
    def to_probe(self) -> tuple[int, ...]:
        """The states before rounds that only read: elsewhere the run committed itself, and agrees with itself."""
        return tuple(
            k for k, tools in enumerate(self.rounds) if tools and all(self.effects[tool] == "reads" for tool in tools)
        )

    @property
    def conversation(self) -> str:
        """What it shares with other turns; its own id where it stands alone."""
        return self.run.conversation or self.run.id

    def model_at(self, k: int) -> str:
        """The model that replied at s_k, as it was recorded."""
        call = self.steps[k].model_call
        return (call.model if call else "") or str(self.run.metadata.get("model", ""))

    def usage_at(self, k: int) -> tuple[Mapping[str, int], bool]:
        """Tokens of the model call at s_k, and whether they had to be guessed from the texts."""
        step = self.steps[k]
        if step.model_call is not None and step.model_call.usage.get("input_tokens"):
            return step.model_call.usage, False
        read = tokens_of(step.messages) + len(json.dumps(list(self.run.tools), default=str)) // _CHARACTERS_A_TOKEN
        return {"input_tokens": read, "output_tokens": tokens_of([step.reply] if step.reply else [])}, True

    def amounts(self, prices: Prices) -> tuple[tuple[Amount, ...], ...]:
        """What leaving out each call of each round would have saved.

        A run that stops a round earlier makes one model call less: the one that would have read the round's results.
        It saves what that call read; and, since the answer is written either way, the tokens and the time in which
        the model asked for the round. Calls made at once share these equally.
        """
        found = []
        for k, tools in enumerate(self.rounds):
            step, share = self.steps[k], 1 / max(1, len(tools))
            model = self._saved_model_call(k, prices)
            seconds = step.model_call.seconds if step.model_call else 0.0
            executed = [outcome for outcome in step.round.outcomes if outcome.executed] if step.round else []
            waited = step.round.seconds if step.round else 0.0
            found.append(
                tuple(
                    Amount(
                        dollars=prices.of_tool(outcome.tool, outcome.cost) + share * model.dollars,
                        seconds=share * (waited + seconds),
                        tokens=round(share * model.tokens),
                        unpriced=round(share * model.unpriced),
                        guessed=round(share * model.guessed),
                    )
                    for outcome in executed
                )
            )
        return tuple(found)

    def audited(self, verdicts: Sequence[bool | None], prices: Prices, *, kind: str | None = None) -> AuditedTurn:
        """What the accounting reads, given a verdict on each state."""
        rounds = tuple(
            tuple(
                AuditedCall(tool=tool, effect=self.effects[tool], amount=amount)
                for tool, amount in zip(tools, amounts, strict=True)
            )
            for tools, amounts in zip(self.rounds, self.amounts(prices), strict=True)
        )
        return AuditedTurn(
            id=self.run.id, conversation=self.conversation, rounds=rounds, verdicts=tuple(verdicts),
            kind=self.run.question.kind if kind is None else kind,
        )  # fmt: skip

    def _saved_model_call(self, k: int, prices: Prices) -> Amount:
        (asking, guessed_asking), (reading, guessed_reading) = self.usage_at(k), self.usage_at(k + 1)
        read, written = reading.get("input_tokens", 0), asking.get("output_tokens", 0)
        reading_cost = prices.of_call(self.model_at(k + 1), {**reading, "output_tokens": 0})
        asking_cost = prices.of_call(self.model_at(k), {"input_tokens": 0, "output_tokens": written})
        return Amount(
            dollars=(reading_cost.read if reading_cost else 0.0) + (asking_cost.written if asking_cost else 0.0),
            tokens=read + written,
            unpriced=(0 if reading_cost else read) + (0 if asking_cost else written),
            guessed=guessed_reading * read + guessed_asking * written,
        )


@dataclass(kw_only=True)
class Survey:
    """What is in a store, and the sample that is audited."""

    turns: int = 0
    """Turns that count: finished, and not forced."""
    with_calls: int = 0
    """Of these, turns with a reading call; the sample is drawn from them."""
    calls: Counter[Effect] = field(default_factory=Counter)
    """Executed calls, by what their tools do."""
    tools: dict[str, tuple[Effect, int]] = field(default_factory=dict)
    """Effect and calls of each tool."""
    models: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    """Turns that don't count, by the reason."""
    conversations: int = 0
    definitions: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of each tool that was called, as far as its calls show it."""
    sample: list[RecordedTurn] = field(default_factory=list)
    """In an order drawn at random, the same for the same seed."""

    @property
    def undeclared(self) -> list[str]:
        """Tools of which nobody said what they do, the most called first."""
        found = [(count, tool) for tool, (effect, count) in self.tools.items() if effect == "unknown"]
        return [tool for _, tool in sorted(found, reverse=True)]

    @property
    def scale(self) -> float:
        """How many turns with calls each sampled one stands for."""
        return self.with_calls / len(self.sample) if self.sample else 1.0


def survey(
    runs: Iterable[Trajectory],
    effects: ToolEffects,
    *,
    sample: int | None = None,
    seed: int = 0,
    of_model: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Survey:
    """Read recorded runs once.

    Args:
        runs: Whole trajectories, in any order.
        effects: Which tools read.
        sample: How many turns with calls to keep, drawn at random; `None` for all.
        seed: Of the drawing; a larger sample holds the smaller one of the same seed.
        of_model: Only runs of this model, as it was named then.
        progress: Called after each run.

    Raises:
        ConfigurationError: the sample is empty.
    """
    if sample is not None and sample < 1:
        raise ConfigurationError(f"sample={sample!r}: at least one turn is audited.")
    found, kept, conversations = Survey(), _Lowest(sample), set[str]()
    for run in runs:
        progress()
        if reason := _unfit(run, of_model):
            found.left_out[reason] += 1
            continue
        try:
            turn = _recorded(run, effects)
        except InputError:
            found.left_out["unreadable messages"] += 1
            continue
        if not turn.steps[-1].answered:
            found.left_out["no answer"] += 1
            continue
        found.turns += 1
        conversations.add(turn.conversation)
        found.models[turn.model_at(len(turn.steps) - 1)] += 1
        for outcome in (outcome for step in turn.steps if step.round for outcome in step.round.outcomes):
            found.definitions[outcome.tool] = definition_of(
                outcome.tool, outcome.arguments, found.definitions.get(outcome.tool)
            )
        for tools in turn.rounds:
            for tool in tools:
                effect = turn.effects[tool]
                found.calls[effect] += 1
                found.tools[tool] = effect, found.tools.get(tool, (effect, 0))[1] + 1
        if any(turn.effects[tool] == "reads" for tools in turn.rounds for tool in tools):
            found.with_calls += 1
            kept.offer(_lot(seed, run.id), turn)
    found.conversations = len(conversations)
    found.sample = [_with_definitions(turn, found.definitions, effects) for turn in kept.in_order()]
    return found


def definition_of(
    tool: str, arguments: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """A definition that fits a call, and those from which an earlier one was made: a name and its arguments' names."""
    known = earlier["function"]["parameters"]["properties"] if earlier else {}
    properties = {**known, **{str(name): {} for name in arguments}}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": tool, "description": "", "parameters": parameters}}


def tokens_of(messages: Iterable[BaseMessage]) -> int:
    """About how many tokens messages take, from the length of their texts and calls."""
    characters = 0
    for message in messages:
        characters += len(str(message.text))
        if isinstance(message, AIMessage) and message.tool_calls:
            characters += len(json.dumps([[call["name"], call["args"]] for call in message.tool_calls], default=str))
    return -(-characters // _CHARACTERS_A_TOKEN)


class _Lowest:
    """The items with the lowest lots, as many as are wanted: a sample that needs one pass."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._heap: list[tuple[int, int, RecordedTurn]] = []
        self._seen = 0

    def offer(self, lot: int, turn: RecordedTurn) -> None:
        self._seen += 1
        entry = (-lot, self._seen, turn)
        if self._most is None or len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def in_order(self) -> list[RecordedTurn]:
        return [turn for _, _, turn in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


def _lot(seed: int, id_: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{id_}".encode(errors="surrogatepass")).digest()[:8])


def _unfit(run: Trajectory, of_model: str | None) -> str:
    if run.status != "finished":
        return "failed"
    if run.branch != "free":
        return "forced"
    if of_model is not None and of_model not in {str(run.metadata.get("model", "")), *(it.model for it in run.calls)}:
        return "another model"
    return ""


def _recorded(run: Trajectory, effects: ToolEffects) -> RecordedTurn:
    steps = steps_of(run)
    names = {outcome.tool for step in steps if step.round for outcome in step.round.outcomes}
    names |= {name for definition in run.tools if (name := _name(definition))}
    return RecordedTurn(
        run=run,
        steps=steps,
        effects={name: effects.of(name, run.tools) for name in names},
        definitions=tuple(
            {"type": "function", "function": dict(it.get("function", it))} for it in run.tools if _name(it)
        ),
    )


def _with_definitions(
    turn: RecordedTurn, called: Mapping[str, Mapping[str, Any]], effects: ToolEffects
) -> RecordedTurn:
    if turn.definitions:
        return turn
    known = {name: effects.of(name) for name in called} | dict(turn.effects)
    return replace(turn, definitions=tuple(called.values()), effects=known)


def _name(definition: Mapping[str, Any]) -> str:
    function = definition.get("function", definition)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _declared(definition: Mapping[str, Any]) -> bool | None:
    """True where it says that the tool only reads, False where it says that it does not, `None` where it is silent."""
    function = definition.get("function", {})
    parts = (definition, function if isinstance(function, Mapping) else {})
    return declared_read_only(*(place for it in parts for place in (it, it.get("metadata"), it.get("annotations"))))
