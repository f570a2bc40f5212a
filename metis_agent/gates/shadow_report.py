"""What a gate that only watched would have saved: counted turn by turn, live or from recorded trajectories.

Where it stands: `ShadowGate` leaves in each decision what its inner gate would have decided; this sets that beside
what then ran. A turn is followed as far as it really went: where the gate would have answered at some step, every
call from that step on would not have run; where it would have allowed other tools, the calls of those that it
would not. What the model would have answered instead is not known, so nothing is said about accuracy: for that,
evaluate the gate on recorded branches.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from metis_agent.gates.familiarity import UNFAMILIAR
from metis_agent.turns import turn_of
from metis_agent.types import GateDecision, ToolOutcome, Trajectory

__all__ = ["ShadowReport", "ShadowTally", "ToolSaving", "asked_calls", "shadow_report"]


@dataclass(frozen=True, kw_only=True)
class ToolSaving:
    """Of one tool."""

    calls: int = 0
    """Executed calls."""
    calls_saved: int = 0
    """Those of them that would not have run."""
    seconds_saved: float = 0.0
    """What they took, one after another."""
    cost_saved: float = 0.0
    """What they cost by the tool's declaration."""


@dataclass(frozen=True, kw_only=True)
class ShadowReport:
    """What the watching gate would have saved."""

    turns: int = 0
    """Turns that it watched to their end."""
    direct_turns: int = 0
    """Those of them that it would have answered without any tool."""
    turns_saved: int = 0
    """Those that called tools and would have called none."""
    turns_added: int = 0
    """Those whose first reply called no tool, where the gate would have required a call."""
    unfamiliar_turns: int = 0
    """Those whose question it would have left to the model, being unlike its training."""
    failures: int = 0
    """Decisions at which it failed; there the model would have decided."""
    last_failure: str = ""
    """Why, the last time."""
    per_tool: Mapping[str, ToolSaving] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Executed calls of all tools."""
        return sum(tool.calls for tool in self.per_tool.values())

    @property
    def calls_saved(self) -> int:
        """Calls that would not have run."""
        return sum(tool.calls_saved for tool in self.per_tool.values())

    @property
    def seconds_saved(self) -> float:
        """Tool time of those calls."""
        return sum(tool.seconds_saved for tool in self.per_tool.values())

    @property
    def cost_saved(self) -> float:
        """Declared cost of those calls."""
        return sum(tool.cost_saved for tool in self.per_tool.values())

    def __str__(self) -> str:
        by_tool = ", ".join(f"{name} {it.calls_saved} of {it.calls}" for name, it in sorted(self.per_tool.items()))
        said = f"{self.turns} turns, {self.calls} tool calls, of which the gate would have saved {self.calls_saved}"
        said += f" ({by_tool})" if by_tool else ""
        if self.unfamiliar_turns:
            said += f"; {self.unfamiliar_turns} turns are unlike its training, and left to the model"
        if self.failures:
            said += f"; at {self.failures} decisions it failed and would have saved nothing, the last time with "
            said += self.last_failure
        return said


def shadow_report(
    trajectories: Iterable[Trajectory], *, gate: str | None = None, version: str | None = None
) -> ShadowReport:
    """What a shadow gate would have saved in recorded turns, read one at a time.

    Args:
        trajectories: such as `TrajectoryStore.read()`. Failed ones, and those without a shadow, are left out.
        gate: name of the inner gate; any by default.
        version: its version; any by default.
    """
    tally = ShadowTally(gate=gate, version=version)
    for trajectory in trajectories:
        if trajectory.status == "finished":
            asked = [_ids(message.get("data", {})) for message in trajectory.messages if message.get("type") == "ai"]
            tally.add(trajectory.decisions, asked, trajectory.outcomes)
    return tally.report()


def asked_calls(messages: Sequence[BaseMessage]) -> list[set[str]]:
    """Ids of the calls of each of the model's messages in the latest turn."""
    return [_ids(vars(message)) for message in turn_of(messages) if isinstance(message, AIMessage)]


class ShadowTally:
    """Counts; from several threads at once.

    Args:
        gate: name of the inner gate to count; any by default.
        version: its version; any by default.
    """

    def __init__(self, *, gate: str | None = None, version: str | None = None) -> None:
        self._gate, self._version = gate, version
        self._lock = threading.Lock()
        self._report = ShadowReport()

    def report(self) -> ShadowReport:
        """What has been counted so far."""
        return self._report

    def add(
        self, decisions: Sequence[GateDecision], asked: Sequence[Collection[str]], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Count a finished turn.

        Args:
            decisions: the turn's, one for each of the agent's model messages.
            asked: ids of the calls of each model message; another agent's earlier ones may stand before.
            outcomes: the turn's.
        """
        shadows = [self._shadow(decision) for decision in decisions]
        if not any(shadows):
            return
        asked = list(asked)[-len(decisions) :]
        step_of = {id_: step for step, ids in enumerate(asked) for id_ in ids}
        ran = [(step_of.get(outcome.call_id, 0), outcome) for outcome in outcomes if outcome.executed]
        stops = next((step for step, shadow in enumerate(shadows) if _answers(shadow)), len(shadows))
        spared = [o for step, o in ran if step >= stops or _refuses(shadows[step], o.tool)]
        first = shadows[0]
        errors = [str(shadow["error"]) for shadow in shadows if shadow and "error" in shadow]
        with self._lock:
            before = self._report
            self._report = ShadowReport(
                turns=before.turns + 1,
                direct_turns=before.direct_turns + (stops == 0),
                turns_saved=before.turns_saved + (bool(ran) and len(spared) == len(ran)),
                turns_added=before.turns_added + bool(first and first.get("required") and not (asked and asked[0])),
                unfamiliar_turns=before.unfamiliar_turns
                + bool(first and str(first.get("reason", "")).startswith(UNFAMILIAR)),
                failures=before.failures + len(errors),
                last_failure=errors[-1] if errors else before.last_failure,
                per_tool=_with_calls(before.per_tool, [outcome for _, outcome in ran], spared),
            )

    def _shadow(self, decision: GateDecision) -> Mapping[str, Any] | None:
        shadow = decision.shadow
        if not shadow or (self._gate is not None and shadow.get("gate") != self._gate):
            return None
        return None if self._version is not None and shadow.get("version") != self._version else shadow


def _answers(shadow: Mapping[str, Any] | None) -> bool:
    return shadow is not None and "error" not in shadow and not shadow.get("allowed")


def _refuses(shadow: Mapping[str, Any] | None, tool: str) -> bool:
    return shadow is not None and "error" not in shadow and tool not in shadow.get("allowed", ())


def _with_calls(
    before: Mapping[str, ToolSaving], ran: Sequence[ToolOutcome], spared: Sequence[ToolOutcome]
) -> dict[str, ToolSaving]:
    after = dict(before)
    for name in {outcome.tool for outcome in ran}:
        old, saved = after.get(name, ToolSaving()), [outcome for outcome in spared if outcome.tool == name]
        after[name] = ToolSaving(
            calls=old.calls + sum(outcome.tool == name for outcome in ran),
            calls_saved=old.calls_saved + len(saved),
            seconds_saved=old.seconds_saved + sum(outcome.seconds for outcome in saved),
            cost_saved=old.cost_saved + sum(outcome.cost for outcome in saved),
        )
    return after


def _ids(fields: Mapping[str, Any]) -> set[str]:
    calls = [*(fields.get("tool_calls") or ()), *(fields.get("invalid_tool_calls") or ())]
    return {call["id"] for call in calls if call.get("id")}
