"""An agent behind a gate that only watches: nothing of the run changes, whatever happens in here.

What fails is logged and counted, and the agent goes on as it would without. How a turn ends is here too, as it is the
same where the gate is enforced.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from langchain.agents.middleware.types import ExtendedModelResponse, ModelRequest, ModelResponse, ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Overwrite

from metis_agent.messages import turn_of
from metis_agent.middleware.requests import GatedCall, RuleCache, asking, reply_of
from metis_agent.recording.recorder import as_told
from metis_agent.rules.asking import Ask, Reply, Step
from metis_agent.rules.outcomes import OutcomeBuffer
from metis_agent.rules.rules import Offer, Rules
from metis_agent.rules.shapes import open_calls
from metis_agent.rules.state import PendingCall
from metis_agent.rules.turn import Turn, adrive, decide, drive

__all__ = ["Shadow", "ended", "failed"]

logger = logging.getLogger(__name__)

_R = TypeVar("_R")
_ToolResult = ToolMessage | Command[Any]
_Watched = tuple[Turn, Offer]


class Shadow:
    """Asks the gate at each of an agent's model calls, and notes what the agent does.

    Args:
        rules: the agent's; the budget is only counted.
        cache: what the rules know of tools.
        buffer: where outcomes wait.
    """

    def __init__(self, rules: Rules, cache: RuleCache, buffer: OutcomeBuffer) -> None:
        self._rules = rules
        self._cache = cache
        self._buffer = buffer
        self._lock = threading.Lock()
        self.failures = 0
        """Things that went wrong in here so far."""

    def model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Ask the gate, then the model as the request came."""

        def draft(_: Turn, wanted: Ask) -> Reply:
            return reply_of(handler(asking(request, wanted, ())))

        watched = self._try(self._open, request)
        if watched is not None:
            self._try(drive, watched[0], self._deciding(watched), draft)
        try:
            response = handler(request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            self._fail(watched, error)
            raise
        return self._try(self._noted, watched, response) or response

    async def amodel_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """The same without blocking the event loop."""

        async def draft(_: Turn, wanted: Ask) -> Reply:
            return reply_of(await handler(asking(request, wanted, ())))

        watched = self._try(self._open, request)
        if watched is not None:
            try:
                await adrive(watched[0], self._deciding(watched), draft)
            except Exception as error:
                self._count(error)
        try:
            response = await handler(request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(self._fail, watched, error)
            raise
        return self._try(self._noted, watched, response) or response

    def tool_call(self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], _ToolResult]) -> _ToolResult:
        """Let the call run, and note what becomes of it."""
        call = self._try(GatedCall, request, self._rules, self._cache, self._buffer)
        try:
            result = handler(request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            self._fail_call(call, request, error)
            raise
        return result if call is None else self._try(call.returned, result) or result

    async def atool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[_ToolResult]]
    ) -> _ToolResult:
        """The same without blocking the event loop."""
        call = self._try(GatedCall, request, self._rules, self._cache, self._buffer)
        try:
            result = await handler(request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(self._fail_call, call, request, error)
            raise
        return result if call is None else self._try(call.returned, result) or result

    def ended(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The turn has ended."""
        return self._try(ended, self._rules, self._buffer, state) or {}

    def _open(self, request: ModelRequest[Any]) -> _Watched:
        turn = Turn(self._rules, request.state, self._buffer)
        turn.messages = request.messages
        offer = self._cache.offer_of(request.tools)
        if self._rules.recorder is not None:
            self._buffer.note_offer(turn.notes, offer, request.system_message)
        return turn, offer

    def _deciding(self, watched: _Watched) -> Step[None]:
        decision, _ = yield from decide(*watched, watching=True)
        get_stream_writer()({"type": "metis_decision", **vars(decision)})

    def _noted(self, watched: _Watched | None, response: ModelResponse[Any]) -> ExtendedModelResponse[Any] | None:
        if watched is None:
            return None
        (turn, offer), reply = watched, reply_of(response)
        if (message := reply.message) is not None:
            turn.take_reply(message, "act", offer)
            asked = [call for call in open_calls(message, reply.answered) if call in message.tool_calls]
            turn.send([_pending(call) for call in asked if isinstance(call, Mapping)])
        return ExtendedModelResponse(model_response=response, command=Command(update=turn.update()))

    def _fail(self, watched: _Watched | None, error: Exception) -> None:
        if watched is not None:
            self._try(failed, self._rules, self._buffer, watched[0], error)

    def _fail_call(self, call: GatedCall | None, request: ToolCallRequest, error: Exception) -> None:
        if call is not None:
            self._try(call.raised, error)
            turn = self._try(Turn, self._rules, request.state, self._buffer)
            if turn is not None:
                self._try(failed, self._rules, self._buffer, turn, error)

    def _try(self, work: Callable[..., _R], *arguments: Any) -> _R | None:
        try:
            return work(*arguments)
        except Exception as error:
            self._count(error)
            return None

    def _count(self, error: Exception) -> None:
        with self._lock:
            self.failures += 1
        logger.error("Gate %s could not watch: %r", self._rules.gate.gate.name, error, exc_info=error)


def ended(rules: Rules, buffer: OutcomeBuffer, state: Mapping[str, Any]) -> dict[str, Any]:
    """End a turn: the gate is told of it, and it is recorded."""
    turn = Turn(rules, state, buffer)
    update, recorded, offered = turn.end(), turn.recorded(), buffer.offered(turn.notes)
    buffer.forget(turn.notes)
    calls = as_told(turn_of(recorded["messages"]), recorded["calls"])
    if calls != recorded["calls"]:
        # What other middleware has taken out of the messages stays in no record of them.
        update["calls"] = Overwrite([dict(vars(call)) for call in calls])
    rules.record(recorded, offered=offered)
    return update


def failed(rules: Rules, buffer: OutcomeBuffer, turn: Turn, error: Exception) -> None:
    """Record a turn that an error ends, once."""
    if buffer.fails_first(turn.notes):
        rules.record_failure(turn.recorded(), error, offered=buffer.offered(turn.notes))


def _pending(call: Mapping[str, Any]) -> PendingCall:
    arguments = call.get("args")
    return PendingCall(
        id=call.get("id") or "", name=call.get("name") or "", args=arguments if isinstance(arguments, dict) else {}
    )
