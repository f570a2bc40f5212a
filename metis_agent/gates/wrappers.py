"""Gates around a gate: one that only watches, and one that now and then tries the other branch.

They compose, in any order. Each asks the gate that it holds once a decision, in the flavour that it was asked in.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from langchain_core.messages import BaseMessage
from langchain_core.runnables.config import ensure_config

from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate, offered_only
from metis_agent.gates.shadow_report import ShadowReport, ShadowTally, asked_calls
from metis_agent.turns import is_first_step, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolOutcome, ToolSpec

__all__ = ["ExploringGate", "ShadowGate"]


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
