"""`MetisGateMiddleware`: a gate in front of an agent made by `langchain.agents.create_agent`.

Where it stands: every model call of the agent passes the gate before and enforcement after; every tool call passes
enforcement once more; the end of the run passes the recorder. The agent, its model and its tools stay as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from langchain.agents.middleware.types import (
    AgentMiddleware,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    ToolCallRequest,
)
from langchain_core.messages import ToolMessage
from langgraph.errors import GraphBubbleUp
from langgraph.runtime import Runtime
from langgraph.types import Command, Overwrite

from metis_agent.agent import DEFAULT_BLOCK_MESSAGE
from metis_agent.budget import Budget
from metis_agent.gates.base import Gate, SupportsDecide, as_gate
from metis_agent.gates.wrappers import ShadowGate
from metis_agent.graphs.setup import check_block_message, check_seconds
from metis_agent.middleware.asking import Step, adrive, drive
from metis_agent.middleware.ending import Ending
from metis_agent.middleware.ledger import Ledger
from metis_agent.middleware.model_step import GatedStep
from metis_agent.middleware.offer import Offers
from metis_agent.middleware.shadow_step import ShadowStep
from metis_agent.middleware.state import GateState, check_keys, new_turn
from metis_agent.middleware.tool_step import ToolStep
from metis_agent.middleware.turn import TurnView
from metis_agent.recording.recorder import Recorder

__all__ = ["MetisGateMiddleware"]

_ToolResult = ToolMessage | Command[Any]


class MetisGateMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts a gate in front of a LangChain agent.

    Put it last among the middleware that changes what the model is asked or may call (tool selection, summaries),
    and before middleware that tries again or turns errors into messages: what leaves this one as an error is
    recorded as a failed turn.

    With a `ShadowGate` nothing of the run changes: no call is blocked, no budget enforced, no message touched.

    Args:
        gate: decides before every model call which tools are offered; only these run, whatever the model returns.
        budget: what one run may spend on tools; by default 8 calls.
        recorder: writes a trajectory for every run.
        loop_guard: a call that was made before in the same run gets the earlier result; a tool may declare
            `metadata={"repeatable": True}`.
        block_message: what the model reads instead of the result of a call that was not run; a format string with
            the fields `{tool}` and `{reason}`.
        gate_timeout: seconds that a decision may take, a draft not counted; after that the model decides.
        record_calls: keep each run's model calls in `calls`; by default where there is a recorder, or where the
            model leaves token records.

    Raises:
        ConfigurationError: an argument can't be used.

    Example:
        >>> from langchain.agents import create_agent
        >>> from metis_agent import MetisGateMiddleware
        >>> from metis_agent.gates import NeverGate
        >>> agent = create_agent(model, tools, middleware=[MetisGateMiddleware(NeverGate())])  # doctest: +SKIP
        >>> agent.invoke({"messages": [{"role": "user", "content": "hi"}]})["decisions"]  # doctest: +SKIP
    """

    state_schema = GateState

    def __init__(
        self,
        gate: Gate | SupportsDecide,
        *,
        budget: Budget | None = None,
        recorder: Recorder | None = None,
        loop_guard: bool = True,
        block_message: str = DEFAULT_BLOCK_MESSAGE,
        gate_timeout: float | None = None,
        record_calls: bool | None = None,
    ) -> None:
        super().__init__()
        self.gate = as_gate(gate)
        self.budget = budget or Budget()
        self.recorder = recorder
        self._watches = isinstance(self.gate, ShadowGate)
        check_block_message(block_message)
        check_seconds("gate_timeout", gate_timeout)
        self._block_message = block_message
        self._gate_timeout = gate_timeout
        self._record_calls = True if recorder is not None and record_calls is None else record_calls
        self._offers = Offers(self.gate, self.budget, block_message, loop_guard=loop_guard)
        self._ledger = Ledger()
        self._ending = Ending(self.gate, recorder, self._ledger)

    def before_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """Begin a turn.

        Raises:
            ConfigurationError: the agent's own state schema has taken over one of our keys.
        """
        check_keys(state)
        return {
            "decisions": [],
            "outcomes": Overwrite([]),
            "calls": Overwrite([]),
            "metis_turn": new_turn(state["messages"]),
        }

    async def abefore_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """Begin a turn."""
        return self.before_agent(state, runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Decide, ask the model, and settle its calls."""
        view = self._view(request.state)
        try:
            return drive(self._step(request, view), self.gate, self._gate_timeout, handler)
        except GraphBubbleUp:
            raise
        except Exception as error:
            self._ending.fail(view, error)
            raise

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ExtendedModelResponse[Any]:
        """The same without blocking the event loop."""
        view = self._view(request.state)
        try:
            return await adrive(self._step(request, view), self.gate, self._gate_timeout, handler)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(self._ending.fail, view, error)
            raise

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], _ToolResult]
    ) -> _ToolResult:
        """Run a call that may run; answer any other in its tool's place."""
        step = ToolStep(request, self._ledger, self.budget, self._block_message)
        if not self._watches and (message := step.instead()) is not None:
            return message
        try:
            result: _ToolResult = step.returned(handler(request))
            return result
        except GraphBubbleUp:
            raise
        except Exception as error:
            step.raised(error)
            self._ending.fail(self._view(request.state), error)
            raise

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[_ToolResult]]
    ) -> _ToolResult:
        """The same without blocking the event loop."""
        step = ToolStep(request, self._ledger, self.budget, self._block_message)
        if not self._watches and (message := step.instead()) is not None:
            return message
        try:
            result: _ToolResult = step.returned(await handler(request))
            return result
        except GraphBubbleUp:
            raise
        except Exception as error:
            step.raised(error)
            await asyncio.to_thread(self._ending.fail, self._view(request.state), error)
            raise

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """End the turn: record it."""
        view = self._view(state)
        self._ending.end(view)
        return view.update()

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """End the turn; the recording goes to a thread, as stores may be slow."""
        view = self._view(state)
        await asyncio.to_thread(self._ending.end, view)
        return view.update()

    def _view(self, state: Mapping[str, Any]) -> TurnView:
        return TurnView(state, self._ledger, record_calls=self._record_calls)

    def _step(self, request: ModelRequest[Any], view: TurnView) -> Step:
        setup = self._offers.setup_for(request)
        step = ShadowStep if self._watches else GatedStep
        return step(setup, request, view).run()
