"""Gates around a gate, one that only watches and one that explores; and what the watching one would have saved.

They compose, in any order. Each asks the gate that it holds once a decision, in the flavour that it was asked in.

`ShadowGate` leaves in each decision what its inner gate would have decided; the savings, live or from recorded
trajectories, set that beside what then ran. A turn is followed as far as it really went: where the gate would have
answered at some step, every call from that step on would not have run; where it would have allowed other tools, the
calls of those that it would not. What the model would have answered instead is not known, so nothing is said about
accuracy: for that, evaluate the gate on recorded branches.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables.config import ensure_config

from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate, offered_only
from metis_agent.gates.policy import UNFAMILIAR
from metis_agent.messages import is_first_step, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolOutcome, ToolSpec, Trajectory

__all__ = ["ExploringGate", "ShadowGate", "ShadowReport", "ShadowTally", "ToolSaving", "asked_calls", "shadow_report"]


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
    allowed = shadow.get("allowed", ()) if shadow is not None and "error" not in shadow else None
    return isinstance(allowed, list | tuple) and tool not in allowed


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
    if not isinstance(fields, Mapping):
        return set()
    found = (fields.get(name) for name in ("tool_calls", "invalid_tool_calls"))
    ids = (
        call.get("id")
        for calls in found
        if isinstance(calls, list | tuple)
        for call in calls
        if isinstance(call, Mapping)
    )
    return {id_ for id_ in ids if id_ and isinstance(id_, str)}


class _Wrapper(Gate):
    """A gate that holds another."""

    def __init__(self, gate: Gate | SupportsDecide, *, name: str) -> None:
        self.gate = as_gate(gate)
        inner = self.gate
        super().__init__(threshold=inner.threshold, required=inner.required, name=name, version=inner.version)
        self.wants_draft = inner.wants_draft

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        """As the inner gate does."""
        self.gate.check_tools(tools)

    def knows(self, tool: ToolSpec) -> bool:
        """As the inner gate does."""
        return self.gate.knows(tool)

    def after_turn(
        self, messages: Sequence[BaseMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Hand it on."""
        self.gate.after_turn(messages, decisions, outcomes)


class ShadowGate(_Wrapper):
    """Changes nothing: the model decides, and each decision's `shadow` says what the inner gate would have decided.

    An inner gate that fails changes nothing either; the failure is in the shadow. A gate that wants a draft gets
    one, which is a model call more a turn, and its draft is never the answer.

    Args:
        gate: the gate to watch with.

    Example:
        >>> from metis_agent.gates import NeverGate, ShadowGate
        >>> ShadowGate(NeverGate()).report().calls_saved
        0
    """

    def __init__(self, gate: Gate | SupportsDecide) -> None:
        inner = as_gate(gate)
        super().__init__(inner, name=f"shadow:{inner.name}")
        self._tally = ShadowTally()

    def decide(self, request: GateRequest) -> GateDecision:
        """Allow everything, and note what the inner gate says."""
        try:
            return self._watch(request, offered_only(self.gate.decide(request), request))
        except Exception as error:
            return self._watch(request, error)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` in async runs."""
        try:
            return self._watch(request, offered_only(await self.gate.adecide(request), request))
        except Exception as error:
            return self._watch(request, error)

    def after_turn(
        self, messages: Sequence[BaseMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Count the turn."""
        self._tally.add(decisions, asked_calls(messages), outcomes)
        super().after_turn(messages, decisions, outcomes)

    def report(self) -> ShadowReport:
        """What the inner gate would have saved in this process; `shadow_report` reads the same from a store."""
        return self._tally.report()

    def _watch(self, request: GateRequest, seen: GateDecision | Exception) -> GateDecision:
        shadow: dict[str, Any] = {"gate": self.gate.name, "version": self.gate.version}
        if isinstance(seen, GateDecision):
            # Plain values that come back from JSON as they were: lists, no tuples.
            shadow = {**vars(seen), "allowed": list(seen.allowed), "gate": seen.gate or self.gate.name}
            reason = f"{shadow['gate']} would have " + ("answered" if seen.direct else f"allowed {shadow['allowed']}")
        else:
            shadow["error"] = f"{type(seen).__name__}: {seen}"
            reason = f"{self.gate.name} would have failed with {shadow['error']}"
        return GateDecision(
            allowed=tuple([tool.name for tool in request.tools]),
            gate=self.name,
            version=self.version,
            reason=f"shadow: {reason}",
            shadow=shadow,
        )


class ExploringGate(_Wrapper):
    """With a known small probability forces a turn to be answered directly, or to call a tool; the rest stays.

    A gate that always decides alike never sees how the other branch would have ended. At the first step of a turn
    this one leaves the inner decision with probability 1 - rate, and otherwise takes "direct" or "tool" with equal
    chance. `propensity` is the probability of the branch decided on, given the inner decision:
    1 - rate/2 where both agree, rate/2 where the branch was forced. Weigh a recorded turn by 1/propensity to learn
    as if both branches had been tried alike.

    A forced tool turn goes as `AlwaysGate` lets it: any tool, one required, and after that the model decides
    wherever the inner gate would answer.

    Args:
        gate: what decides otherwise.
        rate: probability in (0, 1] of drawing the branch.
        seed: the same question, at the same place of a conversation, gets the same draw; by default each message
            gets its own. A run's `config["configurable"]["seed"]` goes before either, so that rollouts of one
            question differ and can be repeated.

    Raises:
        ConfigurationError: the rate is no probability above 0.
    """

    def __init__(self, gate: Gate | SupportsDecide, *, rate: float = 0.05, seed: int | None = None) -> None:
        inner = as_gate(gate)
        super().__init__(inner, name=f"exploring:{inner.name}")
        if not 0 < rate <= 1:
            raise ConfigurationError(f"The rate of exploration is {rate!r}; it must be a number in (0, 1].")
        self.rate, self.seed = rate, seed
        self._salt = secrets.token_hex(8)

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide, or force a branch."""
        return self._explore(request, offered_only(self.gate.decide(request), request))

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` in async runs."""
        return self._explore(request, offered_only(await self.gate.adecide(request), request))

    def _explore(self, request: GateRequest, decision: GateDecision) -> GateDecision:
        decision = replace(decision, gate=self.name, version=decision.version or self.version)
        turn = turn_of(request.messages)
        branch = self._draw(request.messages, turn)
        everything = tuple([tool.name for tool in request.tools])
        if not is_first_step(turn):
            if branch != "tool" or decision.allowed:
                return decision
            return replace(decision, allowed=everything, reason="exploring: a tool turn; the model decides")
        own = "direct" if decision.direct else "tool"
        if branch in (None, own):
            return replace(decision, propensity=1 - self.rate / 2)
        forced = replace(decision, propensity=self.rate / 2, reason=f"exploring: forced {branch}")
        if branch == "direct":
            return replace(forced, allowed=(), required=False)
        return replace(forced, allowed=everything, required=bool(everything))

    def _draw(self, messages: Sequence[BaseMessage], turn: Sequence[BaseMessage]) -> Literal["direct", "tool"] | None:
        """The turn's branch, the same at each of its steps and in every process; `None` where nothing is forced."""
        text = str(turn[0].text) if turn else ""
        run_seed = ensure_config().get("configurable", {}).get("seed")
        if run_seed is not None:
            key = f"{run_seed}/{text}"
        elif self.seed is not None:
            key = f"{self.seed}/{sum(message.type == 'human' for message in messages)}/{text}"
        else:
            key = f"{self._salt}/{(turn[0].id if turn else None) or text}"
        digest = hashlib.sha256(f"metis-explore/{key}".encode(errors="surrogatepass")).digest()
        uniform = int.from_bytes(digest[:7], "big") / 2**56
        if uniform >= self.rate:
            return None
        return "direct" if uniform < self.rate / 2 else "tool"
