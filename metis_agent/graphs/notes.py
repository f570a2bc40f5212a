"""What a node that asks the model has seen so far, and what it therefore writes to state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage

from metis_agent.graphs.answers import without_calls
from metis_agent.graphs.records import as_dict
from metis_agent.graphs.setup import Setup
from metis_agent.recording.recorder import model_call_of
from metis_agent.turns import seconds_of
from metis_agent.types import TOKEN_RECORD, ModelCall, ToolOutcome

__all__ = ["Notes"]


class Notes:
    """What one node has seen so far: its model calls, the outcomes it has settled, and its time."""

    def __init__(self, setup: Setup, state: Mapping[str, Any], node: str) -> None:
        self._started = time.perf_counter()
        self._setup = setup
        self._state = state
        self._node = node
        self._calls: list[ModelCall] = []
        self.outcomes: list[ToolOutcome] = []

    @property
    def calls(self) -> list[ModelCall]:
        """The model calls, where they are kept."""
        return self._calls

    @property
    def seconds(self) -> float:
        """Time that model and tools have been at work in this turn."""
        seconds: float = self._state.get("seconds", 0.0) + time.perf_counter() - self._started
        return seconds

    @property
    def total_seconds(self) -> float:
        """Time that the turn has been at work."""
        return seconds_of(self._state) + time.perf_counter() - self._started

    def take(self, reply: AIMessage) -> AIMessage:
        """Note a reply of the model."""
        if self._setup.name:
            reply.name = self._setup.name
        keep = self._setup.record_calls
        if keep or (keep is None and TOKEN_RECORD in reply.response_metadata):
            step = len(self._state.get("calls", ())) + len(self._calls)
            self._calls.append(model_call_of(reply, self._node, step))
        return reply

    def strip(self, reply: AIMessage) -> AIMessage:
        """The reply without its calls, each of them noted as blocked."""
        calls = [*reply.tool_calls, *reply.invalid_tool_calls]
        if not calls:
            return reply
        for call in calls:
            call = call if isinstance(call, Mapping) else {}
            tool, arguments = call.get("name") or "unnamed", call.get("args")
            self.outcomes.append(
                ToolOutcome(
                    call_id=call.get("id") or "",
                    tool=tool,
                    arguments=arguments if isinstance(arguments, dict) else {},
                    status="blocked",
                    content=self._setup.block(tool, "no tool can be called in the last answer of a turn"),
                )
            )
        return without_calls(reply)

    def update(self, messages: list[AnyMessage], *, last: bool = False) -> dict[str, Any]:
        """What the node writes to state; after the `last` step, nobody but a recorder asks for the time."""
        update: dict[str, Any] = {"messages": messages}
        if not last or self._setup.recorder is not None:
            update["seconds"] = self.seconds
        if self.outcomes:
            update["outcomes"] = [as_dict(outcome) for outcome in self.outcomes]
        if self._calls:
            update["calls"] = [as_dict(call) for call in self._calls]
        return update

    def state(self) -> dict[str, Any]:
        """The state with what this node adds to it: what there is to record of a turn that fails here."""
        return {
            **self._state,
            "calls": [*self._state.get("calls", ()), *self._calls],
            "outcomes": [*self._state.get("outcomes", ()), *self.outcomes],
            "seconds": self.seconds,
        }
