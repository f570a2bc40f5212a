"""The gate node: opens every step of a turn, and writes the decision where everybody can see it.

It asks the gate, unless there is nothing left to ask: the budget is spent, or the turn leads nowhere. Then the
decision is its own, and says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Overwrite

from metis_agent.budget import NOTHING_SPENT, spending_of
from metis_agent.gates.baselines import ModelGate
from metis_agent.graphs.guard import stuck
from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.turns import check_question, is_first_step, seconds_of, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolOutcome

__all__ = ["GateNode"]

logger = logging.getLogger(__name__)

_NOTABLE_SECONDS = 1e-3


class GateNode(Runnable[Mapping[str, Any], Command[Any]]):
    """Opens every step of a turn: asks the gate, or ends the turn where it has nothing left to decide."""

    def __init__(self, setup: Setup) -> None:
        self.name = "gate"
        self._setup = setup
        self._model_gate = ModelGate()

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step."""
        started = time.perf_counter()
        step = _Step(self._setup, input)
        if step.finished:
            return Command(update=step.time_update(), goto=self._setup.finish)
        decision = step.forced()
        if decision is None:
            try:
                decision = self._setup.gate.decide(step.request)
            except GraphBubbleUp:
                raise
            except Exception as error:
                decision = self._fall_back(step.request, error)
        return self._conclude(step, decision, started)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step without blocking the event loop."""
        started = time.perf_counter()
        step = _Step(self._setup, input)
        if step.finished:
            return Command(update=step.time_update(), goto=self._setup.finish)
        decision = step.forced()
        if decision is None:
            try:
                decision = await self._setup.gate.adecide(step.request)
            except GraphBubbleUp:
                raise
            except Exception as error:
                decision = self._fall_back(step.request, error)
        return self._conclude(step, decision, started)

    def _fall_back(self, request: GateRequest, error: Exception) -> GateDecision:
        name = self._setup.gate.name or type(self._setup.gate).__name__
        reason = f"the gate failed with {type(error).__name__}: {error}; the model decides"
        logger.warning("Gate %s: %s", name, reason)
        return replace(self._model_gate.decide(request), gate=name, version=self._setup.gate.version, reason=reason)

    def _conclude(self, step: _Step, decision: GateDecision, started: float) -> Command[Any]:
        if not isinstance(decision, GateDecision):
            error = TypeError(f"it decided {decision!r}, which is no GateDecision")
            decision = self._fall_back(step.request, error)
        decision = _offered_only(decision, step.request)
        if not decision.seconds and (seconds := time.perf_counter() - started) > _NOTABLE_SECONDS:
            decision = replace(decision, seconds=seconds)
        record = as_dict(decision)
        get_stream_writer()({"type": "metis_decision", **record})
        return Command(update=step.update(record), goto="act" if decision.allowed else "answer")


class _Step:
    """What the gate node knows at one step."""

    __slots__ = ("_outcomes", "_setup", "_state", "_tool_seconds", "_turn", "finished", "first", "request")

    def __init__(self, setup: Setup, state: Mapping[str, Any]) -> None:
        self._setup = setup
        self._state = state
        messages = state.get("messages", [])
        self._turn = turn_of(messages)
        self.first = is_first_step(self._turn)
        self.finished = False
        self._outcomes: Sequence[ToolOutcome] = ()
        self._tool_seconds = 0.0
        spent = NOTHING_SPENT
        if self.first or not state["decisions"]:
            check_question(self._turn)
        if not self.first:
            self._outcomes = state["outcomes"]
            self._tool_seconds = _slowest(self._turn, self._outcomes)
            spent = spending_of(self._outcomes, seconds_of(state) + self._tool_seconds)
            self.finished = setup.returns_directly and _returned_directly(setup, self._turn)
        self.request = GateRequest(messages=messages, tools=setup.within_budget(spent), spent=spent)

    def forced(self) -> GateDecision | None:
        """The decision where there is nothing to ask the gate."""
        if not self.request.tools:
            if not self._setup.specs:
                return GateDecision(allowed=(), gate="metis", reason="the agent has no tools")
            spent = self._setup.budget.spent(self.request.spent)
            return GateDecision(allowed=(), gate="budget", reason=spent or "the budget of every tool is spent")
        reason = None if self.first else stuck(self._turn, self._outcomes)
        return GateDecision(allowed=(), gate="loop guard", reason=reason) if reason else None

    def time_update(self) -> dict[str, Any]:
        """Adds the time of the tools that have just run; they ran side by side, so none of them can."""
        return {"seconds": self._state.get("seconds", 0.0) + self._tool_seconds} if self._tool_seconds else {}

    def update(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the step writes to state: a first step also clears what an earlier turn has left."""
        state = self._state
        if not self.first:
            return {"decisions": [*map(as_dict, state["decisions"]), record], **self.time_update()}
        update: dict[str, Any] = {"decisions": [record]}
        for key in ("outcomes", "calls"):
            if state.get(key):
                update[key] = Overwrite([])
        if state.get("seconds"):
            update["seconds"] = 0.0
        return update


def _offered_only(decision: GateDecision, request: GateRequest) -> GateDecision:
    """The decision without tools that were not on offer, in the order of the offer, and in plain values."""
    allowed = tuple([tool.name for tool in request.tools if tool.name in decision.allowed])
    if allowed == decision.allowed and decision.probabilities is None:
        return decision
    estimates = decision.probabilities
    return replace(
        decision,
        allowed=allowed,
        required=decision.required and bool(allowed),
        probabilities=None if estimates is None else {name: float(value) for name, value in estimates.items()},
    )


def _slowest(turn: Sequence[AnyMessage], outcomes: Sequence[ToolOutcome]) -> float:
    """Time that the latest message's calls took."""
    message = next((message for message in reversed(turn) if isinstance(message, AIMessage)), None)
    ids = {call["id"] for call in message.tool_calls} if message is not None else set()
    return max([outcome.seconds for outcome in outcomes if outcome.call_id in ids], default=0.0)


def _returned_directly(setup: Setup, turn: Sequence[AnyMessage]) -> bool:
    """True where every call of the latest message ran, and by a tool whose result is the answer."""
    results = []
    for message in reversed(turn):
        if isinstance(message, AIMessage):
            break
        if isinstance(message, ToolMessage):
            results.append(message)
    direct = {name for name, tool in setup.tools.items() if tool.return_direct}
    return bool(results) and all(result.status == "success" and result.name in direct for result in results)
