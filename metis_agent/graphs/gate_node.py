"""The gate node: opens every step of a turn, and writes the decision where everybody can see it.

It asks the gate, unless there is nothing left to ask: the budget is spent, or the turn leads nowhere. Then the
decision is its own, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.types import Command

from metis_agent.gates.asking import adecided, decided
from metis_agent.graphs.drafts import adrafted, drafted
from metis_agent.graphs.gate_step import Step
from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.types import GateDecision

__all__ = ["GateNode"]

_NOTABLE_SECONDS = 1e-3


class GateNode(Runnable[Mapping[str, Any], Command[Any]]):
    """Opens every step of a turn: asks the gate, or ends the turn where it has nothing left to decide."""

    def __init__(self, setup: Setup) -> None:
        self.name = "gate"
        self._setup = setup

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step."""
        step = Step(self._setup, input)
        if step.finished:
            return step.finish()
        decision = step.forced()
        if decision is None:
            if step.wants_draft:
                step.take(drafted(self._setup, input))
            decision = decided(self._setup.gate, step.request, self._setup.gate_timeout)
        return self._conclude(step, decision)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step without blocking the event loop."""
        step = Step(self._setup, input)
        if step.finished:
            return step.finish()
        decision = step.forced()
        if decision is None:
            if step.wants_draft:
                step.take(await adrafted(self._setup, input))
            decision = await adecided(self._setup.gate, step.request, self._setup.gate_timeout)
        return self._conclude(step, decision)

    def _conclude(self, step: Step, decision: GateDecision) -> Command[Any]:
        if not decision.seconds and (seconds := time.perf_counter() - step.started) > _NOTABLE_SECONDS:
            decision = replace(decision, seconds=seconds)
        if step.drafted and step.drafted.failure:
            decision = replace(decision, reason="; ".join(filter(None, (step.drafted.failure, decision.reason))))
        record = as_dict(decision)
        get_stream_writer()({"type": "metis_decision", **record})
        update = step.update(record)
        goto = "act" if decision.allowed else "answer"
        if step.drafted and step.add_draft(update, decision):
            goto = self._setup.finish
        return Command(update=update, goto=goto)
