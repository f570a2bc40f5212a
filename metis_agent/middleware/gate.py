"""`MetisGateMiddleware`: a gate in front of an agent made by `langchain.agents.create_agent`.

Where it stands: every model call of the agent passes the gate before and enforcement after; every tool call passes
enforcement once more; the end of the run passes the recorder. The agent, its model and its tools stay as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Annotated, Any, NotRequired, cast

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    OmitFromSchema,
    ToolCallRequest,
)
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool
from langgraph.channels import UntrackedValue
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.runtime import Runtime
from langgraph.types import Command

from metis_agent.deadline import DeadlineError, arun_within, run_within
from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate
from metis_agent.gates.wrappers import ShadowGate
from metis_agent.middleware.requests import GatedCall, RuleCache, asking, replaced, reply_of
from metis_agent.middleware.shadow import Shadow, ended, failed
from metis_agent.recording.recorder import Recorder
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, AskedGate, Reply, Settled, Step
from metis_agent.rules.budget import Budget
from metis_agent.rules.outcomes import InThread, OutcomeBuffer, is_sync_only
from metis_agent.rules.rules import DEFAULT_BLOCK_MESSAGE, Offer, Rules, check_seconds
from metis_agent.rules.state import Notes, PendingCall, Records
from metis_agent.rules.turn import Turn, adrive, decide, drive, respond
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["GateState", "MetisGateMiddleware"]

_ToolResult = ToolMessage | Command[Any]
_OUT_ONLY = OmitFromSchema(input=True, output=False)
_PRIVATE = OmitFromSchema(input=True, output=True)


class GateState(AgentState[Any]):
    """State of an agent behind a gate; the three lists describe the latest turn."""

    decisions: NotRequired[Annotated[list[GateDecision], _OUT_ONLY, Records(GateDecision, append=False)]]
    outcomes: NotRequired[Annotated[list[ToolOutcome], _OUT_ONLY, Records(ToolOutcome)]]
    calls: NotRequired[Annotated[list[ModelCall], _OUT_ONLY, Records(ModelCall)]]
    metis_turn: NotRequired[Annotated[Notes, _PRIVATE]]
    metis_run: NotRequired[Annotated[bool, _PRIVATE, UntrackedValue]]


class MetisGateMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts a gate in front of a LangChain agent.

    Put it last among the middleware that changes what the model is asked or may call (tool selection, summaries),
    and before middleware that tries again or turns errors into messages: what leaves this one as an error is
    recorded as a failed turn.

    With a `ShadowGate` nothing of the run changes: no call is blocked, no budget enforced, no message touched, and
    whatever fails in here is logged and counted in `failures`.

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
        ungated: names of tools that are the model's to decide, as those are that the gate does not know.
        never: names of tools that are never offered and never run.
        always: names of tools that stay on offer whatever the gate decides.

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
        ungated: Collection[str] = (),
        never: Collection[str] = (),
        always: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.gate = as_gate(gate)
        self.budget = budget or Budget()
        self.recorder = recorder
        check_seconds("gate_timeout", gate_timeout)
        watching = isinstance(self.gate, ShadowGate)
        self._rules = Rules(
            gate=AskedGate(self.gate, gate_timeout),
            budget=self.budget,
            block_message=block_message,
            recorder=recorder,
            record_calls=True if recorder is not None and record_calls is None else record_calls,
            ungated=frozenset() if watching else frozenset(ungated),
            never=frozenset() if watching else frozenset(never),
            always=frozenset() if watching else frozenset(always),
        )
        self._cache = RuleCache(self._rules, loop_guard=loop_guard, watching=watching)
        self._buffer = OutcomeBuffer()
        self._shadow = Shadow(self._rules, self._cache, self._buffer) if watching else None

    @property
    def failures(self) -> int:
        """How often something of a gate that only watches has failed so far; the log says what."""
        return 0 if self._shadow is None else self._shadow.failures

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """Decide, ask the model, and settle its calls."""
        if self._shadow is not None:
            return self._shadow.model_call(request, handler)
        call = self._model_call(request)
        try:
            return drive(call.turn, call.steps(), lambda _, wanted: reply_of(handler(call.asking(wanted))))
        except GraphBubbleUp:
            raise
        except Exception as error:
            self._failed(call.turn, error)
            raise

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """The same without blocking the event loop."""
        if self._shadow is not None:
            return await self._shadow.amodel_call(request, handler)
        call = self._model_call(request)

        async def ask(_: Turn, wanted: Ask) -> Reply:
            return reply_of(await handler(call.asking(wanted)))

        try:
            return await adrive(call.turn, call.steps(), ask)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(self._failed, call.turn, error)
            raise

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], _ToolResult]
    ) -> _ToolResult:
        """Run a call that may run; answer any other in its tool's place."""
        if self._shadow is not None:
            return self._shadow.tool_call(request, handler)
        call = GatedCall(request, self._rules, self._cache, self._buffer)
        if (message := call.instead()) is not None:
            return message
        limit = call.seconds_left
        try:
            return call.returned(handler(request) if limit is None else run_within(limit, handler, request))
        except GraphBubbleUp:
            raise
        except DeadlineError:
            return call.timed_out(limit or 0.0)
        except Exception as error:
            call.raised(error)
            self._failed(Turn(self._rules, request.state, self._buffer), error)
            raise

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[_ToolResult]]
    ) -> _ToolResult:
        """The same without blocking the event loop."""
        if self._shadow is not None:
            return await self._shadow.atool_call(request, handler)
        call = GatedCall(request, self._rules, self._cache, self._buffer)
        if (message := call.instead()) is not None:
            return message
        limit = call.seconds_left
        if limit is not None and request.tool is not None and is_sync_only(request.tool):
            # Not in the event loop's pool, which waits for a tool that was left behind.
            request = request.override(tool=cast(BaseTool, InThread(request.tool)))
        try:
            running = handler(request)
            return call.returned(await (running if limit is None else arun_within(limit, running)))
        except GraphBubbleUp:
            raise
        except DeadlineError:
            return call.timed_out(limit or 0.0)
        except Exception as error:
            call.raised(error)
            await asyncio.to_thread(self._failed, Turn(self._rules, request.state, self._buffer), error)
            raise

    def after_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """End the turn: the gate is told of it, and it is recorded."""
        if self._shadow is not None:
            return self._shadow.ended(state)
        return ended(self._rules, self._buffer, state)

    async def aafter_agent(self, state: Any, runtime: Runtime[Any]) -> dict[str, Any]:
        """End the turn; the recording goes to a thread, as stores may be slow."""
        if self.recorder is None:
            return self.after_agent(state, runtime)
        return await asyncio.to_thread(self.after_agent, state, runtime)

    def _model_call(self, request: ModelRequest[Any]) -> _ModelCall:
        turn = Turn(self._rules, request.state, self._buffer)
        # Without a runtime, other middleware has made the request by hand.
        if turn.new and request.runtime is not None:
            _check_keys(request.state)
        return _ModelCall(request, turn, self._cache.offer_of(request.tools))

    def _failed(self, turn: Turn, error: Exception) -> None:
        failed(self._rules, self._buffer, turn, error)


class _ModelCall:
    """One model call of the agent.

    A reply of which nothing can run is answered here and the model asked again at once, so that other middleware
    never sees a call that leads nowhere: a person is not asked to approve it.
    """

    def __init__(self, request: ModelRequest[Any], turn: Turn, offer: Offer) -> None:
        self.turn = turn
        self._offer = offer
        messages = sendable(request.messages)
        same = messages is request.messages
        self._request = request if same else request.override(messages=list(messages))
        turn.messages = self._request.messages
        self._said: list[Any] = []
        """Replies of which nothing could run, with the messages that answer their calls."""

    def asking(self, wanted: Ask) -> ModelRequest[Any]:
        """LangChain's request for what a step wants to ask."""
        return asking(self._request, wanted, self._said)

    def steps(self) -> Step[ExtendedModelResponse[Any]]:
        """Ask until there is an answer, or a call to run."""
        structured = self._request.response_format is not None
        while True:
            decision, draft = yield from decide(self.turn, self._offer)
            get_stream_writer()({"type": "metis_decision", **vars(decision)})
            settled = yield from respond(self.turn, self._offer, decision, draft, structured=structured)
            plan = settled.plan
            if plan is None:
                return self._conclude(replaced(settled.reply.response, settled.message, before=self._said))
            if plan.run:
                return self._conclude(self._sent(settled))
            if settled.message is not None:
                self._said += [settled.message, *plan.replies]

    def _sent(self, settled: Settled) -> ModelResponse[Any]:
        """The response with its calls on their way: those that may run to their tools, the others to their messages.

        The latter get their message in their tool's place, not here: middleware that looks at a reply's calls after
        the model may answer them too, and a call must have one message.
        """
        plan = settled.plan
        assert plan is not None
        replies = {message.tool_call_id: message for message in plan.replies}
        # LangChain sends no call that it could not parse: these are answered at once.
        unparsed = [replies.pop(call["id"] or "") for call in plan.message.invalid_tool_calls]
        pending, arguments = (
            list(self.turn.notes["pending"]),
            {outcome.call_id: dict(outcome.arguments) for outcome in plan.outcomes},
        )
        for id_, message in replies.items():
            name, content, status = message.name or "", message.content, message.status
            pending.append(PendingCall(id=id_, name=name, args=arguments[id_], settled=content, status=status))
        self.turn.change(pending=pending)
        return replaced(settled.reply.response, settled.message, before=self._said, beside=unparsed)

    def _conclude(self, response: ModelResponse[Any]) -> ExtendedModelResponse[Any]:
        return ExtendedModelResponse(model_response=response, command=Command(update=self.turn.update()))


def _check_keys(state: Mapping[str, Any]) -> None:
    """Refuse an agent whose own state schema has taken over one of our keys.

    Raises:
        ConfigurationError: it has.
    """
    for key in ("decisions", "outcomes", "calls"):
        if not isinstance(state.get(key), list):
            raise ConfigurationError(
                f"The agent's state has {key}={state.get(key)!r}; MetisGateMiddleware keeps a list of records there. "
                "Rename that key in your state_schema."
            )
