"""A proxy of a tool: the same name, description and schema, and it calls the tool.

Neither the model nor the graph sees a difference. The base of `InstrumentedTool`, which adds to the call.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, StructuredTool, Tool
from pydantic import PrivateAttr, SkipValidation

from metis_agent.deadline import arun_in_thread, start_in_thread

__all__ = ["ProxyTool", "injected"]

_SAME = (
    "name", "description", "args_schema", "response_format", "return_direct", "tags", "extras", "callbacks",
    "verbose", "handle_validation_error",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Wants:
    """What LangChain hands to a tool's method where it has a parameter for it."""

    config: tuple[str, ...]
    run_manager: bool

    @classmethod
    def of(cls, method: Callable[..., Any]) -> _Wants:
        parameters = inspect.signature(method).parameters
        try:
            hints = get_type_hints(method)
        except (NameError, TypeError):  # as written, where a name is known to type checkers only
            hints = {name: parameter.annotation for name, parameter in parameters.items()}
        config = tuple(name for name, hint in hints.items() if hint in (RunnableConfig, "RunnableConfig"))
        return cls(config=config, run_manager="run_manager" in parameters)

    def filled(self, config: RunnableConfig, run_manager: Any) -> dict[str, Any]:
        given: dict[str, Any] = dict.fromkeys(self.config, config)
        return given | {"run_manager": run_manager} if self.run_manager else given


class ProxyTool(BaseTool):
    """The same as a tool, to what prepares its arguments; a subclass adds to `_run` and `_arun`.

    Args:
        tool: any LangChain tool.
        **fields: those of a tool that are not to be the same.
    """

    tool: SkipValidation[BaseTool]

    _in_thread: bool = PrivateAttr(default=False)
    _async_only: bool = PrivateAttr(default=False)
    _sync_wants: _Wants = PrivateAttr()
    _async_wants: _Wants = PrivateAttr()

    def __init__(self, tool: BaseTool, **fields: Any) -> None:
        super().__init__(tool=tool, **{name: getattr(tool, name) for name in _SAME}, **fields)
        self._in_thread, self._async_only = _is_sync_only(tool), _is_async_only(tool)
        self._sync_wants, self._async_wants = _Wants.of(tool._run), _Wants.of(tool._arun)

    @property
    def func(self) -> Callable[..., Any] | None:
        """The tool's function, in which LangGraph looks for what to inject."""
        return getattr(self.tool, "func", None)

    @property
    def coroutine(self) -> Callable[..., Awaitable[Any]] | None:
        """The tool's async function."""
        return getattr(self.tool, "coroutine", None)

    @property
    def tool_call_schema(self) -> Any:
        """What the model sees."""
        return self.tool.tool_call_schema

    def get_input_schema(self, config: RunnableConfig | None = None) -> Any:
        """What the tool takes."""
        return self.tool.get_input_schema(config)

    def _to_args_and_kwargs(
        self, tool_input: str | dict[str, Any], tool_call_id: str | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.tool._to_args_and_kwargs(tool_input, tool_call_id)

    def _filter_injected_args(self, tool_input: dict[str, Any]) -> dict[str, Any]:
        return self.tool._filter_injected_args(tool_input)

    def _run(self, *args: Any, config: RunnableConfig, run_manager: Any = None, **kwargs: Any) -> Any:
        return self._call(args, kwargs, config, run_manager)

    async def _arun(self, *args: Any, config: RunnableConfig, run_manager: Any = None, **kwargs: Any) -> Any:
        return await self._acall(args, kwargs, config, run_manager)

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: RunnableConfig, run_manager: Any) -> Any:
        """The tool's own call; one that only knows an async one is made on an event loop of its own."""
        if self._async_only:
            made = partial(self.tool._arun, *args, **kwargs, **self._async_wants.filled(config, run_manager))
            # Not in this thread, which may have a loop that runs.
            return start_in_thread(asyncio.run, made()).result()
        return self.tool._run(*args, **kwargs, **self._sync_wants.filled(config, run_manager))

    async def _acall(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: RunnableConfig, run_manager: Any
    ) -> Any:
        """The tool's own call; one that only knows a sync one is made in a thread of its own."""
        if self._in_thread:
            manager = run_manager.get_sync() if run_manager is not None else None
            return await arun_in_thread(lambda: self._call(args, kwargs, config, manager))
        return await self.tool._arun(*args, **kwargs, **self._async_wants.filled(config, run_manager))


def injected(tool: BaseTool) -> set[str]:
    """Names of the arguments that the graph gives, and not the model."""
    taken = set(getattr(tool.get_input_schema(), "model_fields", {}))
    shown = getattr(tool.tool_call_schema, "model_fields", None)
    return (set() if shown is None else taken - set(shown)) | set(tool._injected_args_keys)


def _is_sync_only(tool: BaseTool) -> bool:
    """True where the async method would only run the sync one in a thread of the event loop's pool."""
    if isinstance(tool, StructuredTool | Tool):
        return tool.coroutine is None
    return type(tool)._arun is BaseTool._arun


def _is_async_only(tool: BaseTool) -> bool:
    """True where there is no sync method, as for every tool of an MCP server; and for a proxy of such a tool."""
    if isinstance(tool, ProxyTool):
        return False
    return isinstance(tool, StructuredTool) and tool.func is None and tool.coroutine is not None
