"""The node behind each tool's name: runs one call that has passed enforcement, within its time.

Two kinds. A tool that is given nothing but the model's arguments is called at once. One that has state, store
or `ToolRuntime` injected goes through LangGraph's `ToolNode`, which knows how, and so does every tool where a
recorder needs the state of a failed run; this module then wraps each call.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolNode
from langgraph.prebuilt.tool_node import ToolCallRequest
from langgraph.types import Command
from pydantic import BaseModel

from metis_agent.deadline import arun_in_thread, arun_within, run_within
from metis_agent.errors import InfrastructureError
from metis_agent.graphs.models import Setup
from metis_agent.rules.asking import SentCall
from metis_agent.rules.outcomes import (
    InLoop,
    InThread,
    ToolResult,
    commands_of,
    failure_of,
    is_async_only,
    is_sync_only,
)
from metis_agent.rules.turn import Turn
from metis_agent.types import OutcomeStatus

__all__ = ["tool_nodes"]

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
    return {name: _PlainToolNode(tool, runner, full) if _is_plain(tool) else full for name, tool in setup.tools.items()}


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
        try:
            return self._runner.run(input[0], lambda: self._run(dict(input[0]), config))
        except InfrastructureError as error:
            self._failed(input, config, error)
            raise

    async def ainvoke(
        self, input: Sequence[SentCall], config: RunnableConfig | None = None, **_: Any
    ) -> list[Command[Any]]:
        """Run one call without blocking the event loop."""
        tool, call = self._tool, dict(input[0])
        try:
            if self._in_thread:
                return await self._runner.arun(input[0], lambda: arun_in_thread(tool.invoke, call, config))
            return await self._runner.arun(input[0], lambda: tool.ainvoke(call, config))
        except InfrastructureError as error:
            await asyncio.to_thread(self._failed, input, config, error)
            raise

    def _failed(self, input: Sequence[SentCall], config: RunnableConfig | None, error: Exception) -> None:
        if self._runner.records:
            # A node that was sent a call alone reads the state as LangGraph's own does.
            self._runner.record_failure(self._full._extract_state(list(input), config or {}), error)  # type: ignore[arg-type]


class _Runner:
    """Time limits and failures, the same for both kinds."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.records = setup.rules.recorder is not None
        self._in_thread = {name for name, tool in setup.tools.items() if is_sync_only(tool)}

    def run(self, call: SentCall, execute: _Sync) -> list[Command[Any]]:
        """Run a call, in a thread of its own where its time is limited."""
        started, limit = time.perf_counter(), self._limit(call)
        status: OutcomeStatus | None = None
        try:
            result = execute() if limit is None else run_within(limit, execute)
        except Exception as error:
            status, result = failure_of(call, error, limit)
        seconds, cost = time.perf_counter() - started, self._setup.offer.terms[call["name"]].cost
        return commands_of(call, result, status=status, seconds=seconds, cost=cost)

    async def arun(self, call: SentCall, execute: _Async) -> list[Command[Any]]:
        """Run a call on the event loop."""
        started, limit = time.perf_counter(), self._limit(call)
        status: OutcomeStatus | None = None
        try:
            result = await (execute() if limit is None else arun_within(limit, execute()))
        except Exception as error:
            status, result = failure_of(call, error, limit)
        seconds, cost = time.perf_counter() - started, self._setup.offer.terms[call["name"]].cost
        return commands_of(call, result, status=status, seconds=seconds, cost=cost)

    def wrap(self, request: ToolCallRequest, execute: Callable[[ToolCallRequest], ToolResult]) -> Any:
        """For `ToolNode`: run what it has prepared."""
        if request.tool is not None and is_async_only(request.tool):
            request = request.override(tool=cast(BaseTool, InLoop(request.tool)))
        try:
            return self.run(cast(SentCall, request.tool_call), lambda: execute(request))
        except InfrastructureError as error:
            self.record_failure(request.state, error)
            raise

    async def awrap(self, request: ToolCallRequest, execute: Callable[[ToolCallRequest], Awaitable[ToolResult]]) -> Any:
        """For `ToolNode` in async runs."""
        if request.tool is not None and request.tool.name in self._in_thread:
            request = request.override(tool=cast(BaseTool, InThread(request.tool)))
        try:
            return await self.arun(cast(SentCall, request.tool_call), lambda: execute(request))
        except InfrastructureError as error:
            await asyncio.to_thread(self.record_failure, request.state, error)
            raise

    def _limit(self, call: SentCall) -> float | None:
        """Seconds that the call may take."""
        timeout = self._setup.tool_timeout
        if "seconds_left" not in call:
            return timeout
        left = max(0.0, call["seconds_left"])
        return left if timeout is None else min(left, timeout)

    def record_failure(self, state: Any, error: Exception) -> None:
        """Store what there is of a turn that an error of the infrastructure ends."""
        rules = self._setup.rules
        rules.record_failure(Turn(rules, state).recorded(), error)


def _is_plain(tool: BaseTool) -> bool:
    """True where all that the tool takes is what the model sees of it; in doubt, False."""
    shown, taken = tool.tool_call_schema, tool.get_input_schema()
    if not (isinstance(shown, type) and issubclass(shown, BaseModel) and issubclass(taken, BaseModel)):
        return False
    names = set(shown.model_fields)
    if set(taken.model_fields) != names:
        return False
    # Called with a config or callbacks by LangChain itself.
    names |= {"self", "config", "callbacks", "run_manager"}
    functions = [getattr(tool, name, None) for name in ("func", "coroutine")]
    if not any(functions):
        functions = [tool._run, tool._arun]
    return all(
        parameter.name in names or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        for function in functions
        if function is not None
        for parameter in inspect.signature(function).parameters.values()
    )
