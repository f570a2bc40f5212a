"""What an agent has agreed on: its gate, budget and recorder, and what it does where one of them ends or fails a turn.

`Rules` are settled when an agent is made and shared by all its turns; an `Offer` is what the rules know of the tools
of one model call: in our own graph always the same, behind `create_agent` whatever other middleware has left.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from langchain_core.messages import SystemMessage
from langchain_core.tools import BaseTool
from langgraph.runtime import get_runtime

from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate
from metis_agent.gates.reference import ModelGate
from metis_agent.recording.recorder import Recorder, definitions_of
from metis_agent.rules.asking import AskedGate
from metis_agent.rules.budget import Budget, ToolTerms
from metis_agent.types import Branch, GateDecision, Spending, ToolSpec

__all__ = [
    "DEFAULT_BLOCK_MESSAGE",
    "Offer",
    "Rules",
    "check_block_message",
    "check_seconds",
    "current_run_id",
    "is_function",
    "spec_of",
]

DEFAULT_BLOCK_MESSAGE = "The call of {tool} was not run: {reason}."

logger = logging.getLogger(__name__)

Definitions = tuple[Mapping[str, Any], ...]


class Offered(TypedDict):
    """What the model calls of a turn read beside its messages, as it is recorded."""

    tools: Definitions
    system_prompt: SystemMessage | None


_NOTHING: Offered = {"tools": (), "system_prompt": None}


class Offer:
    """The tools of one model call.

    Args:
        specs: what the gate may know of them.
        terms: what each declares of itself.
        rules: the agent's.
        remote: names of those that only run at the model's provider.
        open: other code may add tools that the rules do not see; a call of another name goes on, and whoever knows
            the agent's own tools settles it.
        tools: the tools themselves, where they are to be recorded.
    """

    __slots__ = (
        "_at_provider", "_definitions", "all_gated", "every", "gated", "known", "names", "open", "remote", "specs",
        "terms", "tools",
    )  # fmt: skip

    def __init__(
        self,
        specs: Sequence[ToolSpec],
        terms: Mapping[str, ToolTerms],
        rules: Rules,
        remote: Collection[str] = (),
        *,
        open: bool = False,
        tools: Sequence[BaseTool | Mapping[str, Any]] = (),
    ) -> None:
        self.open = open
        self.tools = tools
        self._definitions: Definitions | None = None
        self.every = tuple(specs)
        """With those that are never to be called."""
        self.specs = tuple([spec for spec in specs if spec.name not in rules.never])
        self.remote = frozenset(remote)
        self.terms = terms
        self.names = tuple([spec.name for spec in self.specs])
        self._at_provider = [
            spec_of(tool).name for tool in tools if not isinstance(tool, BaseTool) and not is_function(tool)
        ]
        gate, free = rules.gate.gate, rules.ungated
        self.known = tuple([spec for spec in self.every if gate.knows(spec)])
        """Tools that the gate can decide on, whatever the lists say of them: what it is checked against."""
        self.gated = tuple([spec for spec in self.known if spec.name not in free and spec.name not in rules.never])
        """Tools that the gate decides on; the others are the model's to decide."""
        self.all_gated = len(self.gated) == len(self.specs) and not rules.always

    @property
    def definitions(self) -> Definitions:
        """What the model is told of the tools, as it is recorded."""
        if self._definitions is None:
            self._definitions = definitions_of(self.tools)
        return self._definitions

    def under(self, rules: Rules) -> Offer:
        """The same tools under other rules."""
        return Offer(self.every, self.terms, rules, self.remote, open=self.open, tools=self.tools)

    def named(self, tool: str, server: bool = False) -> str:
        """The name under which a tool of the provider is on offer.

        That is `web_search_preview` for `web_search`, `code_execution` for `bash_code_execution` and for what
        LangChain calls `code_interpreter`, and `mcp` for the tools of a `server`.
        """
        theirs = self._at_provider
        fitting = [
            *[name for name in theirs if server and name.startswith("mcp")],
            *[name for name in self.names if name == tool],
            *[name for name in theirs if name.startswith(tool)],
            *[name for name in theirs if tool.endswith(f"_{name}")],
            *[name for name in theirs if (tool, name) == ("code_interpreter", "code_execution")],
        ]
        return fitting[0] if fitting else tool

    def within(self, budget: Budget, spent: Spending) -> tuple[ToolSpec, ...]:
        """The tools that may still be called after this spending."""
        if budget.spent(spent):
            return ()
        if budget.same_for_all:
            return self.specs
        return tuple([spec for spec in self.specs if not budget.refuses(spec.name, self.terms[spec.name].cost, spent)])


def spec_of(tool: BaseTool | Mapping[str, Any]) -> ToolSpec:
    """What a gate may know of a tool; one that runs at the provider is a mapping, with its name there or its type."""
    if isinstance(tool, BaseTool):
        return ToolSpec(name=tool.name, description=tool.description)
    # In the forms of OpenAI's and of Bedrock's clients the name is further in.
    inner = next((tool[key] for key in ("function", "toolSpec", "systemTool") if key in tool), None)
    fields = inner if isinstance(inner, Mapping) else tool
    name = fields.get("name") or tool.get("type") or next(iter(tool), "unnamed")
    return ToolSpec(name=str(name), description=str(fields.get("description") or ""))


def is_function(tool: Mapping[str, Any]) -> bool:
    """Whether a tool that is written as a mapping is a function of the agent's, and does not run at the provider."""
    return (
        "function" in tool
        or "input_schema" in tool
        or tool.get("type") == "function"
        or ("name" in tool and "type" not in tool)
    )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What holds in every turn of one agent."""

    gate: AskedGate
    budget: Budget
    block_message: str = DEFAULT_BLOCK_MESSAGE
    """With the fields `{tool}` and `{reason}`."""
    recorder: Recorder | None = None
    record_calls: bool | None = None
    """Keep model calls in state; `None`: where the model leaves token records."""
    name: str | None = None
    """Given to the model's messages, for multi-agent graphs."""
    refused: set[str] = field(default_factory=set)
    """Settings that the model has refused, and is not asked with again."""

    ungated: frozenset[str] = frozenset()
    """Tools that are the model's to decide: the gate is not asked about them."""
    never: frozenset[str] = frozenset()
    """Tools that are never offered and never run."""
    always: frozenset[str] = frozenset()
    """Tools that are on offer at every step with a tool left, whatever the gate decides."""
    watched: bool = field(init=False)
    """True where the gate wants to know how turns ended."""
    leaves_all: bool = field(init=False)
    """True where the gate leaves every decision to the model."""
    counts_calls_only: bool = field(init=False)
    """True where the budget depends on nothing but the number of calls."""

    def __post_init__(self) -> None:
        check_block_message(self.block_message)
        for one, other in (("ungated", "never"), ("ungated", "always"), ("never", "always")):
            if both := getattr(self, one) & getattr(self, other):
                raise ConfigurationError(
                    f"{one} and {other} both name {sorted(both)!r}; a tool can be in one of these lists only."
                )
        watched = getattr(self.gate.gate.after_turn, "__func__", None) is not Gate.after_turn
        object.__setattr__(self, "watched", watched)
        object.__setattr__(self, "leaves_all", getattr(self.gate.gate.decide, "__func__", None) is ModelGate.decide)
        object.__setattr__(self, "counts_calls_only", self.budget.seconds is None and self.budget.same_for_all)

    def block(self, tool: str, reason: str) -> str:
        """What the model is told instead of a result."""
        return self.block_message.format(tool=tool, reason=reason)

    def allowed(
        self, chosen: Collection[str], tools: Sequence[ToolSpec], gated: Collection[ToolSpec]
    ) -> tuple[str, ...]:
        """The tools to offer: what the gate has chosen, and what is not the gate's to decide."""
        return tuple([t.name for t in tools if t.name in chosen or t not in gated or t.name in self.always])

    def forced(self, offer: Offer, spent: Spending, loop: str) -> GateDecision:
        """The decision where there is nothing to ask the gate: no tool is left, or the turn goes round in circles."""
        if loop:
            return GateDecision(allowed=(), gate="loop guard", reason=loop)
        if not offer.specs:
            return GateDecision(allowed=(), gate="metis", reason="the agent has no tools")
        reason = self.budget.spent(spent) or "the budget of every tool is spent"
        return GateDecision(allowed=(), gate="budget", reason=reason)

    def record(self, state: Mapping[str, Any], error: Exception | None = None, offered: Offered = _NOTHING) -> None:
        """Store a turn, where there is a recorder.

        Args:
            state: the agent's.
            error: what ended the turn.
            offered: what its model calls read beside its messages.

        Raises:
            StorageError: the store can't be written to.
        """
        if self.recorder is not None:
            branch: Branch = getattr(self.gate.gate, "branch", "free")
            self.recorder.record(state, run_id=current_run_id(), branch=branch, error=error, **offered)

    def record_failure(self, state: Mapping[str, Any], error: Exception, offered: Offered = _NOTHING) -> None:
        """Store what there is of a turn that `error` ends; the caller raises that error, whatever happens here."""
        try:
            self.record(state, error, offered)
        except Exception:
            logger.exception("A failed turn could not be recorded")


def current_run_id() -> str | None:
    """The run's id; where the agent is a node of another graph, which may run it several times, with its place."""
    info = get_runtime().execution_info
    if info is None or info.run_id is None:
        return None
    outer = info.checkpoint_ns.rpartition("|")[0]
    return f"{info.run_id}/{outer}" if outer else info.run_id


def check_block_message(template: str) -> None:
    """Refuse a message that can't be filled in.

    Raises:
        ConfigurationError: it has other fields than `{tool}` and `{reason}`.
    """
    try:
        template.format(tool="", reason="")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigurationError(
            f"block_message is {template!r}; it must be a format string with no fields but {{tool}} and {{reason}}."
        ) from error


def check_seconds(option: str, seconds: float | None) -> None:
    """Refuse a time limit that is none.

    Raises:
        ConfigurationError: it is neither `None` nor a positive number.
    """
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ConfigurationError(
            f"{option} is {seconds!r}; it must be a positive number of seconds, or None for no limit."
        )
