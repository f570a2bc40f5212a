"""One tool call of an agent behind the gate: may it run, and what became of it."""

from __future__ import annotations

import time
from typing import Any

from langchain.agents.middleware.types import ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command

from metis_agent.middleware.requests import RuleCache
from metis_agent.rules.outcomes import OutcomeBuffer, abandoned, outcome_of, without_records
from metis_agent.rules.rules import Rules
from metis_agent.rules.state import Notes
from metis_agent.rules.turn import Turn
from metis_agent.types import OutcomeStatus, ToolOutcome

__all__ = ["GatedCall"]

_ToolResult = ToolMessage | Command[Any]


class GatedCall:
    """One tool call of the agent: may it run, and what became of it."""

    def __init__(self, request: ToolCallRequest, rules: Rules, cache: RuleCache, buffer: OutcomeBuffer) -> None:
        self._request = request
        self._call = request.tool_call
        self._rules = rules
        self._terms = cache.terms_of(request.tool)
        self._buffer = buffer
        self._notes: Notes | None = request.state.get("metis_turn")
        self._started = time.perf_counter()

    @property
    def seconds_left(self) -> float | None:
        """What the budget leaves of time; `None` for no limit."""
        limit = self._rules.budget.seconds
        if limit is None or self._notes is None:
            return None
        return max(0.0, limit - Turn(self._rules, self._request.state).spent.seconds)

    def instead(self) -> ToolMessage | None:
        """What the model reads in place of the result, where the call must not run."""
        for sent in self._notes["pending"] if self._notes else ():
            if sent["id"] == self._call["id"]:
                if "settled" not in sent:
                    return None
                status: Any = sent["status"]
                return ToolMessage(sent["settled"], name=sent["name"], tool_call_id=sent["id"], status=status)
        return self._stray()

    def _stray(self) -> ToolMessage | None:
        """The same for a call that no gated reply has held: other middleware has brought it in."""
        turn, call, cost = Turn(self._rules, self._request.state), self._call, self._terms.cost
        reason = self._rules.budget.refuses(call["name"], cost, turn.spent)
        if not turn.decisions or call["name"] not in turn.decisions[-1].allowed:
            reason = "the gate did not allow it at this step"
        if reason is None:
            return None
        text = self._rules.block(call["name"], reason)
        self._note("blocked", text)
        return ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error")

    def returned(self, result: _ToolResult) -> _ToolResult:
        """Note the result; it goes on as it is, but for records of another agent that the tool has asked."""
        # LangChain itself answers a call of a tool that the agent does not have.
        missing = self._request.tool is None and isinstance(result, ToolMessage) and result.status == "error"
        seconds, cost = (0.0, 0.0) if missing else self._spent()
        self._keep(outcome_of(self._call, result, seconds=seconds, cost=cost, status="blocked" if missing else None)[0])
        kept: _ToolResult = without_records(result)
        return kept

    def timed_out(self, limit: float) -> ToolMessage:
        """Note that the budget's time was up, and tell the model."""
        message = abandoned(self._call, limit)
        self._note("timeout", str(message.text))
        return message

    def raised(self, error: Exception) -> None:
        """Note that the tool raised."""
        self._note("error", f"{type(error).__name__}: {error}")

    def _note(self, status: OutcomeStatus, content: str) -> None:
        call = self._call
        seconds, cost = (0.0, 0.0) if status == "blocked" else self._spent()
        self._keep(
            ToolOutcome(
                call_id=call["id"] or "", tool=call["name"], arguments=call["args"], status=status, content=content,
                seconds=seconds, cost=cost,
            )
        )  # fmt: skip

    def _spent(self) -> tuple[float, float]:
        return time.perf_counter() - self._started, self._terms.cost

    def _keep(self, outcome: ToolOutcome) -> None:
        if self._notes is not None:
            self._buffer.add(self._notes, outcome)
