"""One tool call of the agent: may it run, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool
from langgraph.prebuilt.tool_node import ToolCallRequest

from metis_agent.budget import Budget, ToolTerms, spending_of, terms_of
from metis_agent.middleware.ledger import Ledger, outcome_of
from metis_agent.middleware.state import turn_in
from metis_agent.types import ToolOutcome

__all__ = ["ToolStep"]


class ToolStep:
    """A tool call on its way to its tool.

    Args:
        request: LangChain's request.
        ledger: where its outcome goes.
        budget: what one turn may spend.
        block_message: what the model reads instead of a result.
    """

    def __init__(self, request: ToolCallRequest, ledger: Ledger, budget: Budget, block_message: str) -> None:
        self._request = request
        self._state: Mapping[str, Any] = request.state
        self._turn = turn_in(self._state)
        self._ledger = ledger
        self._budget = budget
        self._block_message = block_message
        self._started = time.perf_counter()

    def instead(self) -> ToolMessage | None:
        """What the model reads in place of the result, where the call must not run."""
        call = self._request.tool_call
        sent = next((pending for pending in self._turn["pending"] if pending["id"] == call["id"]), None)
        if sent is None:
            return self._stray()
        if "settled" not in sent:
            return None
        status: Any = sent["status"]
        return ToolMessage(content=sent["settled"], name=sent["name"], tool_call_id=call["id"], status=status)

    def _stray(self) -> ToolMessage | None:
        """The same for a call that no gated reply has held: other middleware has brought it in."""
        call, decisions = self._request.tool_call, self._state["decisions"]
        reason = self._budget.refuses(call["name"], self._terms.cost, spending_of(self._state["outcomes"]))
        if not decisions or call["name"] not in decisions[-1].allowed:
            reason = "the gate did not allow it at this step"
        if reason is None:
            return None
        text = self._block_message.format(tool=call["name"], reason=reason)
        outcome = ToolOutcome(
            call_id=call["id"] or "", tool=call["name"], arguments=call["args"], status="blocked", content=text
        )
        self._ledger.add(self._turn, outcome)
        return ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error")

    def returned(self, result: Any) -> Any:
        """Note the result; it goes on as it is."""
        # LangChain itself answers a call of a tool that the agent does not have.
        missing = self._request.tool is None and isinstance(result, ToolMessage) and result.status == "error"
        self._note(result, "blocked" if missing else None)
        return result

    def raised(self, error: Exception) -> None:
        """Note that the tool raised."""
        call = self._request.tool_call
        text = f"{type(error).__name__}: {error}"
        self._note(ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error"), "error")

    def _note(self, result: Any, status: Any) -> None:
        seconds = time.perf_counter() - self._started
        outcome = outcome_of(self._request.tool_call, result, seconds=seconds, cost=self._terms.cost, status=status)
        self._ledger.add(self._turn, outcome)

    @property
    def _terms(self) -> ToolTerms:
        tool = self._request.tool
        return terms_of(tool) if isinstance(tool, BaseTool) else ToolTerms()
