"""What an agent is made of: settled when it is created, shared by all its nodes, never changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AnyMessage, SystemMessage
from langchain_core.tools import BaseTool
from langgraph.runtime import get_runtime

from metis_agent.budget import Budget, ToolTerms
from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate
from metis_agent.graphs.bindings import Bindings
from metis_agent.graphs.orphans import with_all_results
from metis_agent.recording.recorder import Recorder
from metis_agent.types import Branch, GateDecision, Spending, ToolOutcome, ToolSpec

__all__ = ["Setup", "check_block_message", "check_seconds", "current_run_id"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of one agent."""

    models: Bindings
    gate: Gate
    tools: Mapping[str, BaseTool]
    specs: tuple[ToolSpec, ...]
    terms: Mapping[str, ToolTerms]
    budget: Budget
    block_message: str
    """With the fields `{tool}` and `{reason}`."""
    tool_timeout: float | None = None
    """Seconds."""
    system_message: SystemMessage | None = None
    name: str | None = None
    """Given to the model's messages, for multi-agent graphs."""
    recorder: Recorder | None = None
    record_calls: bool | None = None
    """Keep model calls in state; `None`: where there is a recorder, or the model leaves token records."""
    returns_directly: bool = False
    """True where any tool's result ends the turn."""
    gate_timeout: float | None = None
    """Seconds."""

    def __post_init__(self) -> None:
        self.gate.check_tools(self.specs)

    @property
    def finish(self) -> str:
        """The node after the turn's end."""
        return "record" if self.recorder is not None else "__end__"

    def prompt(self, messages: Sequence[AnyMessage]) -> Sequence[AnyMessage]:
        """The conversation as the model sees it."""
        messages = with_all_results(messages)
        return [self.system_message, *messages] if self.system_message is not None else messages

    def within_budget(self, spending: Spending) -> tuple[ToolSpec, ...]:
        """The tools that may still be called after this spending."""
        if self.budget.spent(spending):
            return ()
        if self.budget.same_for_all:
            return self.specs
        return tuple(
            [spec for spec in self.specs if not self.budget.refuses(spec.name, self.terms[spec.name].cost, spending)]
        )

    @property
    def watched(self) -> bool:
        """True where the gate wants to know how turns ended."""
        return type(self.gate).after_turn is not Gate.after_turn

    def turn_ended(
        self, messages: Sequence[AnyMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Tell a gate that keeps count; whatever becomes of that, the turn has ended."""
        try:
            self.gate.after_turn(messages, decisions, outcomes)
        except Exception:
            logger.exception("Gate %s could not take note of a turn", self.gate.name)

    def record_failure(self, state: Mapping[str, Any], error: Exception) -> None:
        """Store what there is of a turn that `error` ends; the caller raises that error, whatever happens here."""
        try:
            self.record(state, error)
        except Exception:
            logger.exception("A failed turn could not be recorded")

    def record(self, state: Mapping[str, Any], error: Exception | None = None) -> None:
        """Store the state's latest turn, where there is a recorder."""
        if self.recorder is None:
            return
        branch: Branch = getattr(self.gate, "branch", "free")
        self.recorder.record(state, run_id=current_run_id(), branch=branch, error=error)

    def block(self, tool: str, reason: str) -> str:
        """What the model is told instead of a result."""
        return self.block_message.format(tool=tool, reason=reason)


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
