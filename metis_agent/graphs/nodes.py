"""The graph's nodes: they ask the gate and the model, record, run one tool call each, and say where a run goes next.

A tool that is given nothing but the model's arguments is called at once. One that has state, store or `ToolRuntime`
injected goes through LangGraph's `ToolNode`, which knows how, and so does every tool where a recorder needs the state
of a failed run; each call is then wrapped here.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, cast, get_args, get_origin, get_type_hints

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt import ToolNode, ToolRuntime
from langgraph.prebuilt.tool_node import ToolCallRequest, msg_content_output
from langgraph.types import Command, Send
from pydantic import BaseModel

from metis_agent.deadline import DeadlineError, arun_in_thread, arun_within, is_async_only, is_sync_only, run_within
from metis_agent.errors import InfrastructureError
from metis_agent.graphs.models import BoundModel, Setup
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, Reply, SentCall, Settled, Step
from metis_agent.rules.outcomes import (
    InLoop,
    InThread,
    ToolResult,
    commands_of,
    failure_of,
    outcome_of,
)
from metis_agent.rules.state import check_question
from metis_agent.rules.turn import Turn, adrive, decide, drive, respond
from metis_agent.types import GateDecision, OutcomeStatus

__all__ = ["AskingNode", "GateNode", "RecordNode", "is_plain_node", "tool_nodes"]


class _Node(Runnable[Mapping[str, Any], Any]):
    """A node of the agent's graph."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.name = name
        self._setup = setup

    def _form(self, turn: Turn, wanted: Ask) -> tuple[BoundModel, Sequence[AnyMessage]]:
        """The chat model in the form that a step wants, and the conversation as it is to see it."""
        setup, prompt = self._setup, sendable(turn.messages)
        if setup.system_message is not None:
            prompt = [setup.system_message, *prompt]
        if wanted.after:
            prompt = [*prompt, *wanted.after]
        if wanted.allowed:
            return setup.models.acting(wanted.allowed, required=wanted.required), prompt
        if wanted.node == "draft":
            return setup.models.drafting(prompt, log_probs=wanted.log_probs), prompt
        return setup.models.answering(prompt, again=wanted.again), prompt

    def _ask(self, turn: Turn, wanted: Ask) -> Reply:
        if (hooks := self._setup.hooks) is not None:
            asked: Reply = hooks.ask(turn, wanted)
            return asked
        model, prompt = self._form(turn, wanted)
        return Reply(message=model.invoke(prompt))

    async def _aask(self, turn: Turn, wanted: Ask) -> Reply:
        if (hooks := self._setup.hooks) is not None:
            asked: Reply = await hooks.aask(turn, wanted)
            return asked
        model, prompt = self._form(turn, wanted)
        return Reply(message=await model.ainvoke(prompt))

    def _reply(self, turn: Turn, decision: GateDecision, reply: Reply | None = None) -> Step[Settled]:
        """The steps to a settled reply; a `reply` that is there is not asked for."""
        return respond(turn, self._setup.offer, decision, reply, structured=self._setup.structured)

    def _settled(self, turn: Turn, settled: Settled) -> Command[Any]:
        """What a settled reply writes to state, and where the run goes."""
        setup, plan, reply = self._setup, settled.plan, settled.reply
        goto: Any = setup.replied or setup.finish
        if plan is not None:
            message = settled.message
            if plan.run and reply.structured is not None:
                turn.change(answered=True)
            elif not plan.run and message is not None and setup.replied:
                message = turn.unsaid(message)
            update = turn.update(message, *plan.replies, *reply.beside)
            goto = (setup.replied or list(map(Send, plan.tools, plan.run))) if plan.run else setup.entry
        elif settled.fails_format:
            update, goto = turn.update(settled.message, *reply.beside), setup.replied or setup.entry
        else:
            update = turn.end(settled.message, *reply.beside)
        return Command(update={**update, **reply.also}, goto=goto)


class GateNode(_Node):
    """Opens every step of a turn: asks the gate, or ends the turn where it has nothing left to decide."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "gate")

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        if self._has_ended(turn):
            return Command(update=turn.end(), goto=setup.finish)
        decision, draft = drive(turn, decide(turn, setup.offer), self._ask)
        get_stream_writer()({"type": "metis_decision", **vars(decision)})
        if draft is None:
            return Command(update=turn.update(), goto="act" if decision.allowed else "answer")
        return self._settled(turn, drive(turn, self._reply(turn, decision, draft), self._ask))

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step without blocking the event loop."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        if self._has_ended(turn):
            return Command(update=turn.end(), goto=setup.finish)
        decision, draft = await adrive(turn, decide(turn, setup.offer), self._aask)
        get_stream_writer()({"type": "metis_decision", **vars(decision)})
        if draft is None:
            return Command(update=turn.update(), goto="act" if decision.allowed else "answer")
        return self._settled(turn, await adrive(turn, self._reply(turn, decision, draft), self._aask))

    def _has_ended(self, turn: Turn) -> bool:
        """Whether the answer is a tool's result, or stood beside the calls; a turn that begins must have a question."""
        if turn.new:
            check_question(turn.notes["question"], turn.messages)
            return False
        direct = self._setup.direct_tools
        return turn.notes.get("answered", False) or (bool(direct) and _answered_directly(turn, direct))


class AskingNode(_Node):
    """Asks the model as the gate decided, and sends each call that may run to its tool.

    No turn begins here, nor where it is recorded, also where a run was stopped and goes on.
    """

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model and settle its reply."""
        turn, setup = Turn(self._setup.rules, input, begins=False), self._setup
        try:
            settled = drive(turn, self._reply(turn, turn.decisions[-1]), self._ask)
        except GraphBubbleUp:
            raise
        except Exception as error:
            setup.rules.record_failure(turn.recorded(), error, offered=setup.offered)
            raise
        return self._settled(turn, settled)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model without blocking the event loop, and settle its reply."""
        turn, setup = Turn(self._setup.rules, input, begins=False), self._setup
        try:
            settled = await adrive(turn, self._reply(turn, turn.decisions[-1]), self._aask)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(setup.rules.record_failure, turn.recorded(), error, offered=setup.offered)
            raise
        return self._settled(turn, settled)


class RecordNode(_Node):
    """Writes the finished turn to the trajectory store."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "record")

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn."""
        rules = self._setup.rules
        rules.record(Turn(rules, input, begins=False).recorded(), offered=self._setup.offered)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn in a thread: stores may be slow."""
        await asyncio.to_thread(self.invoke, input)


def _answered_directly(turn: Turn, direct: Collection[str]) -> bool:
    """True where every call of the latest message ran, and by a tool whose result is the answer."""
    results = []
    for message in reversed(turn.messages):
        if isinstance(message, AIMessage):
            break
        if isinstance(message, ToolMessage):
            results.append(message)
    return bool(results) and all(result.status == "success" and result.name in direct for result in results)


_Sync = Callable[[], ToolResult]
_Async = Callable[[], Awaitable[ToolResult]]


def tool_nodes(setup: Setup) -> dict[str, Runnable[Any, Any]]:
    """A node for each tool, by name."""
    runner = _Runner(setup)
    full = ToolNode(
        list(setup.tools.values()),
        handle_tool_errors=False,
        wrap_tool_call=runner.wrap,
        awrap_tool_call=runner.awrap,
    )
    wrapped = runner.hooks is not None
    return {
        name: full if wrapped or not _is_plain(tool) else _PlainToolNode(tool, runner, full)
        for name, tool in setup.tools.items()
    }


class _PlainToolNode(Runnable[Sequence[SentCall], list[Command[Any]]]):
    """Calls a tool that needs nothing but its arguments."""

    def __init__(self, tool: BaseTool, runner: _Runner, full: ToolNode) -> None:
        self.name = tool.name
        self._tool = tool
        self._run = InLoop(tool).invoke if is_async_only(tool) else tool.invoke
        self._in_thread = is_sync_only(tool)
        self._runner = runner
        self._full = full

    def invoke(self, input: Sequence[SentCall], config: RunnableConfig | None = None, **_: Any) -> list[Command[Any]]:
        """Run one call."""
        started = time.perf_counter()
        try:
            return self._runner.run(input[0], lambda: _sendable(self._run(dict(input[0]), config)))
        except InfrastructureError as error:
            self._failed(input, config, error, started)
            raise

    async def ainvoke(
        self, input: Sequence[SentCall], config: RunnableConfig | None = None, **_: Any
    ) -> list[Command[Any]]:
        """Run one call without blocking the event loop."""
        tool, call, started = self._tool, dict(input[0]), time.perf_counter()

        async def run() -> ToolResult:
            running = arun_in_thread(tool.invoke, call, config) if self._in_thread else tool.ainvoke(call, config)
            return _sendable(await running)

        try:
            return await self._runner.arun(input[0], run)
        except InfrastructureError as error:
            await asyncio.to_thread(self._failed, input, config, error, started)
            raise

    def _failed(
        self, input: Sequence[SentCall], config: RunnableConfig | None, error: Exception, started: float
    ) -> None:
        if self._runner.records:
            # A node that was sent a call alone reads the state as LangGraph's own does.
            state = self._full._extract_state(list(input), config or {})  # type: ignore[arg-type]
            self._runner.record_failure(state, error, input[0], started)


def _sendable(result: ToolResult) -> ToolResult:
    """A tool's result with content that providers take, as `ToolNode` makes it: a list of bare strings is JSON."""
    if isinstance(result, ToolMessage) and isinstance(result.content, list):
        result.content = cast("str | list[Any]", msg_content_output(result.content))
    return result


def is_plain_node(node: object) -> bool:
    """Whether a tool's node reads nothing but the call that it is sent."""
    return isinstance(node, _PlainToolNode)


class _Runner:
    """Time limits and failures, the same for both kinds."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.records = setup.rules.recorder is not None
        self.hooks = setup.hooks if setup.hooks is not None and setup.hooks.wraps else None
        self._in_thread = {name for name, tool in setup.tools.items() if is_sync_only(tool)}

    def run(self, call: SentCall, execute: _Sync, failed: Sequence[Exception] | None = None) -> list[Command[Any]]:
        """Run a call, in a thread of its own where its time is limited.

        Within hooks, `failed` has the tool's errors since it last succeeded: where it is empty, an error is a hook's.
        """
        started, limit = time.perf_counter(), self._limit(call)
        status: OutcomeStatus | None = None
        try:
            result = execute() if limit is None else run_within(limit, execute, of=self._setup.tools[call["name"]])
        except Exception as error:
            status, result = failure_of(call, error, limit)
            if _is_a_hooks(error, failed):
                raise
        seconds, cost = time.perf_counter() - started, self._setup.offer.terms[call["name"]].cost
        return commands_of(call, result, status=status, seconds=seconds, cost=cost)

    async def arun(
        self, call: SentCall, execute: _Async, failed: Sequence[Exception] | None = None
    ) -> list[Command[Any]]:
        """Run a call on the event loop."""
        started, limit = time.perf_counter(), self._limit(call)
        status: OutcomeStatus | None = None
        try:
            of = self._setup.tools[call["name"]]
            result = await (execute() if limit is None else arun_within(limit, execute(), of=of))
        except Exception as error:
            status, result = failure_of(call, error, limit)
            if _is_a_hooks(error, failed):
                raise
        seconds, cost = time.perf_counter() - started, self._setup.offer.terms[call["name"]].cost
        return commands_of(call, result, status=status, seconds=seconds, cost=cost)

    def wrap(self, request: ToolCallRequest, execute: Callable[[ToolCallRequest], ToolResult]) -> Any:
        """For `ToolNode`: run what it has prepared."""

        def run(asked: ToolCallRequest) -> ToolResult:
            if asked.tool is not None and is_async_only(asked.tool):
                asked = asked.override(tool=cast(BaseTool, InLoop(asked.tool)))
            try:
                result = execute(asked)
            except Exception as error:
                failed.append(error)
                raise
            failed.clear()
            return result

        call, hooks, started = cast(SentCall, request.tool_call), self.hooks, time.perf_counter()
        failed: list[Exception] = []
        try:
            if hooks is None:
                return self.run(call, lambda: run(request))
            return self.run(call, lambda: hooks.tool_call(request, run), failed)
        except Exception as error:
            if isinstance(error, InfrastructureError) or (hooks is not None and _is_a_hooks(error, failed)):
                self.record_failure(request.state, error, call, started)
            raise

    async def awrap(self, request: ToolCallRequest, execute: Callable[[ToolCallRequest], Awaitable[ToolResult]]) -> Any:
        """For `ToolNode` in async runs."""

        async def run(asked: ToolCallRequest) -> ToolResult:
            if asked.tool is not None and asked.tool.name in self._in_thread:
                asked = asked.override(tool=cast(BaseTool, InThread(asked.tool)))
            try:
                result = await execute(asked)
            except Exception as error:
                failed.append(error)
                raise
            failed.clear()
            return result

        call, hooks, started = cast(SentCall, request.tool_call), self.hooks, time.perf_counter()
        failed: list[Exception] = []
        try:
            if hooks is None:
                return await self.arun(call, lambda: run(request))
            return await self.arun(call, lambda: hooks.atool_call(request, run), failed)
        except Exception as error:
            if isinstance(error, InfrastructureError) or (hooks is not None and _is_a_hooks(error, failed)):
                await asyncio.to_thread(self.record_failure, request.state, error, call, started)
            raise

    def _limit(self, call: SentCall) -> float | None:
        """Seconds that the call may take."""
        timeout = self._setup.tool_timeout
        if "seconds_left" not in call:
            return timeout
        left = max(0.0, call["seconds_left"])
        return left if timeout is None else min(left, timeout)

    def record_failure(self, state: Any, error: Exception, call: SentCall, started: float) -> None:
        """Store what there is of a turn that an error which is not for the model ends, in this call."""
        rules, seconds = self._setup.rules, time.perf_counter() - started
        turn, cost = Turn(rules, state), self._setup.offer.terms[call["name"]].cost
        said = ToolMessage(f"{type(error).__name__}: {error}", tool_call_id=call["id"], status="error")
        turn.outcomes.append(outcome_of(call, said, seconds=seconds, cost=cost)[0])
        turn.change(seconds=turn.notes["seconds"] + seconds)
        rules.record_failure(turn.recorded(), error, offered=self._setup.offered)


def _is_a_hooks(error: Exception, failed: Sequence[Exception] | None) -> bool:
    """Whether an error of a call came from the hooks around its tool, which has not failed or has then succeeded."""
    return failed is not None and not failed and not isinstance(error, DeadlineError | GraphBubbleUp)


def _is_plain(tool: BaseTool) -> bool:
    """True where all that the tool takes is what the model sees of it; in doubt, False."""
    shown, taken = tool.tool_call_schema, tool.get_input_schema()
    if not (isinstance(shown, type) and issubclass(shown, BaseModel) and issubclass(taken, BaseModel)):
        return False
    names = set(shown.model_fields)
    functions = [function for name in ("func", "coroutine") if (function := getattr(tool, name, None)) is not None]
    functions = functions or [tool._run, tool._arun]
    # A schema of its own may show what the function is given: LangChain's shell does.
    if set(taken.model_fields) != names or ("runtime" in names and any(map(_takes_the_runtime, functions))):
        return False
    # Called with a config or callbacks by LangChain itself.
    names |= {"self", "config", "callbacks", "run_manager"}
    return all(
        parameter.name in names or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
    )


def _takes_the_runtime(function: Callable[..., Any]) -> bool:
    """True where its `runtime` is LangGraph's, and no argument of that name (which `ToolNode` would overwrite)."""
    try:
        hint = get_type_hints(function).get("runtime")
    except (NameError, TypeError):
        return True
    kinds = [get_origin(each) or each for each in (hint, *get_args(hint))]
    return any(isinstance(kind, type) and issubclass(kind, ToolRuntime) for kind in kinds)
