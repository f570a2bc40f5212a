"""What the gate node knows at one step of a turn, and what the step therefore writes to state."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langgraph.types import Command, Overwrite

from metis_agent.budget import NOTHING_SPENT, spending_of
from metis_agent.graphs.drafts import Drafted, kept_draft
from metis_agent.graphs.guard import stuck
from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.turns import check_question, is_first_step, seconds_of, turn_of
from metis_agent.types import GateDecision, GateRequest, ToolOutcome

__all__ = ["Step"]


class Step:
    """What the gate node knows at one step."""

    __slots__ = (
        "_outcomes", "_setup", "_state", "_tool_seconds", "_turn", "drafted", "finished", "first", "request", "started",
    )  # fmt: skip

    def __init__(self, setup: Setup, state: Mapping[str, Any]) -> None:
        self.started = time.perf_counter()
        self.drafted: Drafted | None = None
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
        draft = None if self.first else kept_draft(state)
        self.request = GateRequest(messages=messages, tools=setup.within_budget(spent), spent=spent, draft=draft)

    @property
    def wants_draft(self) -> bool:
        """True where the gate is to be given a new draft: later steps of a turn have that of its first."""
        return self.first and self._setup.gate.wants_draft

    def take(self, draft: Drafted) -> None:
        """Give the gate a draft; the time it took is the model's."""
        self.drafted = draft
        self.request = replace(self.request, draft=draft.draft)
        self.started = time.perf_counter()

    def finish(self) -> Command[Any]:
        """End the turn: a tool has had the last word."""
        state = self._state
        if self._setup.watched:
            self._setup.turn_ended(state["messages"], state["decisions"], state["outcomes"])
        return Command(update=self.time_update(), goto=self._setup.finish)

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
        if state.get("drafted"):
            update["drafted"] = None
        return update

    def add_draft(self, update: dict[str, Any], decision: GateDecision) -> bool:
        """Add what the draft leaves in state; True where it is the answer, and the turn has ended."""
        draft = self.drafted
        assert draft is not None
        answer = draft.answer() if decision.direct else None
        for key, records in (("calls", draft.calls), ("outcomes", draft.outcomes)):
            if records:
                plain = [as_dict(record) for record in records]
                update[key] = Overwrite(plain) if key in update else plain
        update["seconds"] = draft.seconds
        if answer is None:
            update["drafted"] = draft.record
            return False
        update["messages"] = [answer]
        if self._setup.watched:
            self._setup.turn_ended([*self._state["messages"], answer], [decision], draft.outcomes)
        return True


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
