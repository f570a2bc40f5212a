"""`MetisGateMiddleware`: a gate in front of an agent made by `langchain.agents.create_agent`.

Where it stands: every model call of the agent passes the gate before and enforcement after; every tool call passes
enforcement once more; the end of the run passes the recorder. The agent, its model and its tools stay as they are.

`Hooks` is the way round: LangChain's middleware and answer formats in our own graph. `create_agent` makes the parts: a
node that asks the model, through which the graph asks, and a node for each hook that is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from functools import reduce
from typing import Annotated, Any, NotRequired, cast

from langchain.agents import create_agent
from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    OmitFromSchema,
    ToolCallRequest,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.channels import UntrackedValue
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.runtime import Runtime
from langgraph.types import Command

from metis_agent.deadline import DeadlineError, arun_within, is_sync_only, run_within
from metis_agent.errors import ConfigurationError
from metis_agent.gates.base import Gate, SupportsDecide, as_gate
from metis_agent.gates.wrappers import ShadowGate
from metis_agent.middleware.requests import GatedCall, RuleCache, asking, check_keys, replaced, reply_of
from metis_agent.middleware.shadow import Shadow, ended, failed
from metis_agent.recording.recorder import Recorder
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, AskedGate, Reply, Settled, Step
from metis_agent.rules.budget import Budget
from metis_agent.rules.outcomes import InThread, OutcomeBuffer, RecordsAsTold
from metis_agent.rules.rules import DEFAULT_BLOCK_MESSAGE, Offer, Rules, check_seconds
from metis_agent.rules.state import Latest, Notes, PendingCall, Records
from metis_agent.rules.turn import Turn, adrive, decide, drive, respond
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["GateState", "Hooks", "MetisGateMiddleware"]

_ToolResult = ToolMessage | Command[Any]
_wanted: ContextVar[Ask] = ContextVar("metis_wanted")
_KINDS = ("before_agent", "before_model", "after_model", "after_agent")
_OUT_ONLY = OmitFromSchema(input=True, output=False)
_PRIVATE = OmitFromSchema(input=True, output=True)


class GateState(AgentState[Any]):
    """State of an agent behind a gate; the three lists describe the latest turn."""

    decisions: NotRequired[Annotated[list[GateDecision], _OUT_ONLY, Records(GateDecision, append=False)]]
    outcomes: NotRequired[Annotated[list[ToolOutcome], _OUT_ONLY, Records(ToolOutcome)]]
    calls: NotRequired[Annotated[list[ModelCall], _OUT_ONLY, Records(ModelCall)]]
    metis_turn: NotRequired[Annotated[Notes, _PRIVATE, Latest]]
    metis_run: NotRequired[Annotated[bool, _PRIVATE, UntrackedValue(bool, guard=False)]]


class MetisGateMiddleware(AgentMiddleware[Any, Any, Any]):
    """Puts a gate in front of a LangChain agent.

    Put it last among the middleware that changes what the model is asked or may call (tool selection, summaries),
    and before middleware that tries again or turns errors into messages: what leaves this one as an error is
    recorded as a failed turn.

    A reply none of whose calls can run is answered at once, and always kept, recorded and sent back to the model
    without its words: no `after_model` hook sees it, and one may be there to redact them (LangChain does not tell).

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
    transformers = (RecordsAsTold,)

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
            ran = handler(request) if limit is None else run_within(limit, handler, request, of=request.tool)
            return call.returned(ran)
        except GraphBubbleUp:
            raise
        except DeadlineError as error:
            return call.timed_out(limit or 0.0, error)
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
        limit, tool = call.seconds_left, request.tool
        if limit is not None and tool is not None and is_sync_only(tool):
            # Not in the event loop's pool, which waits for a tool that was left behind.
            request = request.override(tool=cast(BaseTool, InThread(tool)))
        try:
            running = handler(request)
            return call.returned(await (running if limit is None else arun_within(limit, running, of=tool)))
        except GraphBubbleUp:
            raise
        except DeadlineError as error:
            return call.timed_out(limit or 0.0, error)
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
            check_keys(request.state)
        offer = self._cache.offer_of(request.tools)
        if self.recorder is not None:
            self._buffer.note_offer(turn.notes, offer, request.system_message)
        return _ModelCall(request, turn, offer)

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
                self._said += [self.turn.unsaid(settled.message), *plan.replies]

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
        pending = list(self.turn.notes["pending"])
        arguments = {outcome.call_id: dict(outcome.arguments) for outcome in plan.outcomes}
        for id_, message in replies.items():
            name, content, status = message.name or "", message.content, message.status
            pending.append(PendingCall(id=id_, name=name, args=arguments[id_], settled=content, status=status))
        self.turn.change(pending=pending)
        return replaced(settled.reply.response, settled.message, before=self._said, beside=unparsed)

    def _conclude(self, response: ModelResponse[Any]) -> ExtendedModelResponse[Any]:
        return ExtendedModelResponse(model_response=response, command=Command(update=self.turn.update()))


class _Narrowed(AgentMiddleware[Any, Any, Any]):
    """Makes LangChain's request what a step wants to ask; outermost, so that the others see it so."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._settings = dict(settings)

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return handler(self._request(request))

    async def awrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        return await handler(self._request(request))

    def _request(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        if self._settings:
            request = request.override(model_settings={**self._settings, **request.model_settings})
        return asking(request, _wanted.get(), ())


class Hooks:
    """What middleware and an answer's format add to an agent's graph.

    Args:
        model: the chat model.
        settings: what it was bound to.
        tools: all that may be on offer, the middleware's own too.
        middleware: LangChain's.
        response_format: of the answer, as `create_agent` takes it.
        system_message: goes before the conversation.
        state_schema: the user's.
        context_schema: the user's.

    Raises:
        ConfigurationError: among the middleware is a gate, or the model was bound to more than settings.
    """

    def __init__(
        self,
        model: Runnable[Any, Any],
        settings: Mapping[str, Any],
        tools: Sequence[BaseTool | Mapping[str, Any]],
        *,
        middleware: Sequence[AgentMiddleware[Any, Any, Any]],
        response_format: Any,
        system_message: SystemMessage | None,
        state_schema: type[Any] | None,
        context_schema: type[Any] | None,
    ) -> None:
        if any(isinstance(one, MetisGateMiddleware) for one in middleware):
            raise ConfigurationError(
                "middleware has a MetisGateMiddleware: this agent has a gate already. Pass that gate as `gate`, or use "
                "create_agent."
            )
        if not isinstance(model, BaseChatModel):
            raise ConfigurationError(
                f"model is a {type(model).__name__}; with middleware or a response_format it must be a chat model, "
                "as it is for create_agent."
            )
        inner = create_agent(
            model,
            [tool if isinstance(tool, BaseTool) else dict(tool) for tool in tools],
            system_prompt=system_message,
            middleware=[_Narrowed(settings), *middleware],
            response_format=response_format,
            state_schema=state_schema,
            context_schema=context_schema,
        )
        self._ask = inner.nodes["model"].bound
        self.state_schema: type[Any] = inner.builder.state_schema
        """The user's with what the hooks keep in state."""
        self.transformers: tuple[Any, ...] = inner.stream_transformers
        self.structured = response_format is not None
        self.wraps = tuple([one for one in middleware if _overrides(one, "wrap_tool_call")])
        self.nodes: dict[str, dict[str, Runnable[Any, Any]]] = {}
        """By kind: each hook that is a node, in the order in which they run."""
        for kind in _KINDS:
            named = {f"{one.name}.{kind}": one for one in middleware if _overrides(one, kind)}
            order = list(named) if kind.startswith("before") else list(reversed(named))
            self.nodes[kind] = {name: inner.nodes[name].bound for name in order}

    def ask(self, turn: Turn, wanted: Ask) -> Reply:
        """Ask the model as a step wants it."""
        token = _wanted.set(wanted)
        try:
            return self._reply(self._ask.invoke(_asked(turn)))
        finally:
            _wanted.reset(token)

    async def aask(self, turn: Turn, wanted: Ask) -> Reply:
        """The same without blocking the event loop."""
        token = _wanted.set(wanted)
        try:
            return self._reply(await self._ask.ainvoke(_asked(turn)))
        finally:
            _wanted.reset(token)

    def tool_call(self, request: Any, execute: Callable[[Any], Any]) -> Any:
        """Run a call within every `wrap_tool_call` hook."""
        run = reduce(lambda inner, one: lambda it: one.wrap_tool_call(it, inner), reversed(self.wraps), execute)
        return run(request)

    async def atool_call(self, request: Any, execute: Callable[[Any], Any]) -> Any:
        """The same without blocking the event loop."""
        run = reduce(lambda inner, one: lambda it: one.awrap_tool_call(it, inner), reversed(self.wraps), execute)
        return await run(request)

    def _reply(self, output: Sequence[Command[Any]]) -> Reply:
        """What the model said, and what else goes to state."""
        update: dict[str, Any] = {}
        for command in output:
            update |= command.update if isinstance(command.update, Mapping) else {}
        messages = update.pop("messages", [])
        asked = next((at for at in range(len(messages) - 1, -1, -1) if isinstance(messages[at], AIMessage)), None)
        if asked is None:
            return Reply(message=None, also=update)
        beside = tuple([message for message in messages[asked + 1 :] if isinstance(message, ToolMessage)])
        return Reply(
            message=messages[asked],
            answered=frozenset([message.tool_call_id for message in beside]),
            structured=update.get("structured_response"),
            beside=beside,
            also=update,
        )


def _asked(turn: Turn) -> dict[str, Any]:
    return {**turn.state, "messages": list(sendable(turn.messages))}


def _overrides(middleware: AgentMiddleware[Any, Any, Any], hook: str) -> bool:
    return any(getattr(type(middleware), name) is not getattr(AgentMiddleware, name) for name in (hook, f"a{hook}"))
