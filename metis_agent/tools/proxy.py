"""A proxy of a tool, and results kept for a while, so that the same call is made once.

A `ProxyTool` has the tool's name, description and schema, and calls it: neither the model nor the graph sees a
difference. `InstrumentedTool` adds to the call. Callers that ask a `ResultCache` for the same key at the same time
share one call: in training, the G rollouts of one question often begin with the same search.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Generic, TypeVar, get_type_hints

from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import PrivateAttr, SkipValidation

from metis_agent.deadline import arun_in_thread, is_async_only, is_sync_only, start_in_thread
from metis_agent.errors import ConfigurationError

__all__ = ["ProxyTool", "ResultCache", "injected"]

V = TypeVar("V")


class ResultCache(Generic[V]):
    """A cache bounded in number and size, for threads and event loops alike; the least recently used entry goes first.

    A call that raises is not kept, but those who waited for it get the same exception: they would only have
    made the same call. Where it was cancelled, one of them makes it.

    Args:
        max_entries: how many results are kept.
        seconds: how long each is good for; `None` for ever.
        clock: seconds that never go back.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    def __init__(
        self, max_entries: int = 1_000, *, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not max_entries >= 1:
            raise ConfigurationError(f"ResultCache(max_entries={max_entries!r}): it must be at least 1.")
        if seconds is not None and not seconds > 0:
            raise ConfigurationError(f"ResultCache(seconds={seconds!r}): it must be more than 0, or None for ever.")
        self._max_entries = max_entries
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Future[V], float, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], V], keep: Callable[[V], bool] | None = None) -> tuple[V, bool]:
        """Return the kept result, or make it.

        Args:
            key: what the result depends on, all of it.
            make: makes the result.
            keep: whether a result may be kept; by default all are.

        Returns:
            The result, and whether it was there already (or under way).
        """
        while True:
            future, mine = self._claim(key)
            if mine:
                return self._settle(key, future, self._made(key, future, make), keep), False
            try:
                return future.result(), True
            except _AbandonedError:
                continue

    async def aget(
        self, key: Hashable, make: Callable[[], Awaitable[V]], keep: Callable[[V], bool] | None = None
    ) -> tuple[V, bool]:
        """As `get`."""
        while True:
            future, mine = self._claim(key)
            if mine:
                try:
                    value = await make()
                except BaseException as error:
                    self._fail(key, future, error)
                    raise
                return self._settle(key, future, value, keep), False
            try:
                return await asyncio.wrap_future(future), True
            except _AbandonedError:
                continue

    def clear(self) -> None:
        """Forget all results."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _claim(self, key: Hashable) -> tuple[Future[V], bool]:
        """Return what will be the result, and whether the caller is the one to make it."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._clock() < entry[1]:
                self._entries.move_to_end(key)
                return entry[0], False
            future: Future[V] = Future()
            future.set_running_or_notify_cancel()  # a waiter that is cancelled can't cancel it for the others
            self._put(key, future, float("inf"))
            return future, True

    def _made(self, key: Hashable, future: Future[V], make: Callable[[], V]) -> V:
        try:
            return make()
        except BaseException as error:
            self._fail(key, future, error)
            raise

    def _settle(self, key: Hashable, future: Future[V], value: V, keep: Callable[[V], bool] | None) -> V:
        if keep is None or keep(value):
            with self._lock:
                until = float("inf") if self._seconds is None else self._clock() + self._seconds
                self._put(key, future, until, _bytes_of(value))
        else:
            self._drop(key, future)
        future.set_result(value)
        return value

    def _fail(self, key: Hashable, future: Future[V], error: BaseException) -> None:
        self._drop(key, future)
        future.set_exception(error if isinstance(error, Exception) else _AbandonedError())

    def _put(self, key: Hashable, future: Future[V], until: float, size: int = 0) -> None:
        self._remove(key)
        self._entries[key] = (future, until, size)
        self._bytes += size
        while len(self._entries) > self._max_entries or (self._bytes > _MOST_BYTES and len(self._entries) > 1):
            self._remove(next(iter(self._entries)))

    def _drop(self, key: Hashable, future: Future[Any]) -> None:
        with self._lock:
            if key in self._entries and self._entries[key][0] is future:
                self._remove(key)

    def _remove(self, key: Hashable) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._bytes -= entry[2]


class _AbandonedError(Exception):
    """The call that others waited for was cancelled."""


_MOST_BYTES = 256_000_000
"""Of all results of a cache, about: a thousand answers with pictures would fill a machine."""


def _bytes_of(value: object) -> int:
    """Bytes of a value and of all that it holds, about."""
    parts, seen, total = [value], set[int](), 0
    while parts:
        part = parts.pop()
        if id(part) in seen or isinstance(part, type | ModuleType):
            continue
        seen.add(id(part))
        total += sys.getsizeof(part, 0)
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, list | tuple | set | frozenset):
            parts += part
        else:
            parts += getattr(part, "__dict__", {}).values()
    return total


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
        self._in_thread, self._async_only = is_sync_only(tool), is_async_only(tool)
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
            return await arun_in_thread(self._call, args, kwargs, config, manager)
        return await self.tool._arun(*args, **kwargs, **self._async_wants.filled(config, run_manager))


def injected(tool: BaseTool) -> set[str]:
    """Names of the arguments that the graph gives, and not the model."""
    taken = set(getattr(tool.get_input_schema(), "model_fields", {}))
    shown = getattr(tool.tool_call_schema, "model_fields", None)
    return (set() if shown is None else taken - set(shown)) | set(tool._injected_args_keys)
