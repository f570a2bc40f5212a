"""Any LangChain tool with a time limit, retries, accounting, a result cache and secrets taken out.

It stands where the tool stood (`proxy`). The tool's code runs within this one's run, so that tracers, too, get the
redacted result. `UsageMeter` adds up what the calls came to.
"""

from __future__ import annotations

import copy
import json
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool, ToolException
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command
from pydantic import BaseModel, Field, PrivateAttr, SkipValidation, ValidationError
from tenacity import AsyncRetrying, Retrying, retry_if_not_exception_type, stop_after_attempt, stop_before_delay

from metis_agent.deadline import DeadlineError, NotCalledError, arun_within, run_within
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.tools.proxy import ProxyTool, ResultCache, injected
from metis_agent.tools.redaction import Redactor
from metis_agent.types import amount_of

__all__ = ["CallEnd", "InstrumentedTool", "ToolUsage", "UsageMeter"]

# Another try would end the same, or it is not for this wrapper to judge: interrupts, a sandbox that is gone.
_FINAL = (ToolException, ValidationError, GraphBubbleUp, InfrastructureError, NotImplementedError)


class InstrumentedTool(ProxyTool):
    """Wraps a tool; what it does not change, it hands through, injected arguments and artifacts included.

    A call that runs out of time, like a `ToolException`, is a tool message with `status="error"`; other errors
    are raised as the tool raises them. Calls whose arguments do not fit the schema are not counted.

    Args:
        tool: any LangChain tool.
        timeout: seconds for a call, retries included; `None` for no limit. Sync code that hangs is left behind.
        retries: further tries after an error, for a tool that is declared `idempotent`.
        idempotent: making the same call twice does no more than making it once.
        cost: declared price of a call; by default the tool's own `metadata["cost"]`.
        repeatable: the same call may be worth making again; by default the tool's own.
        cache: keeps results; giving one declares the tool pure: its result depends on its arguments alone. Tools
            of one name that share a cache must be the same tool.
        redactor: takes secrets out of results, artifacts and error messages.
        meter: adds up the calls; by default one of its own.

    Raises:
        ConfigurationError: a value is out of its range, retries are asked for a tool that is not idempotent, or a
            cache for one that is given more than its arguments.
    """

    timeout: float | None = None
    retries: int = 0
    cache: SkipValidation[ResultCache[Any] | None] = Field(default=None, exclude=True)
    redactor: SkipValidation[Redactor | None] = Field(default=None, exclude=True)
    meter: SkipValidation[UsageMeter] = Field(exclude=True)

    _policy: dict[str, Any] = PrivateAttr(default_factory=dict)

    def __init__(
        self,
        tool: BaseTool,
        *,
        timeout: float | None = None,
        retries: int = 0,
        idempotent: bool = False,
        cost: float | None = None,
        repeatable: bool | None = None,
        cache: ResultCache[Any] | None = None,
        redactor: Redactor | None = None,
        meter: UsageMeter | None = None,
    ) -> None:
        _check(tool, timeout, retries, idempotent, cache)
        price = amount_of(cost)
        if cost is not None and price is None:
            raise ConfigurationError(f"InstrumentedTool(cost={cost!r}): it must be a finite number of at least 0.")
        super().__init__(
            tool,
            timeout=timeout,
            retries=retries,
            cache=cache,
            redactor=redactor,
            meter=meter or UsageMeter(),
            metadata=_terms(tool, price, repeatable),
            handle_tool_error=tool.handle_tool_error or True,
        )
        stop = stop_after_attempt(retries + 1)
        self._policy = {
            "retry": retry_if_not_exception_type(_FINAL),
            "stop": stop if timeout is None else stop | stop_before_delay(timeout),
            "wait": lambda state: random.uniform(0.1, 0.2) * 2 ** (state.attempt_number - 1),
            "reraise": True,
        }

    @property
    def usage(self) -> ToolUsage:
        """What the calls came to so far."""
        return self.meter.read()

    # --- a call ---

    def _run(self, *args: Any, config: RunnableConfig, run_manager: Any = None, **kwargs: Any) -> Any:
        make = partial(self._execute, partial(self._call, args, kwargs, config, run_manager))
        key = self._key(args, kwargs)
        if self.cache is None or key is None:
            return make()
        return self._from_cache(*self.cache.get(key, make, _may_be_kept))

    async def _arun(self, *args: Any, config: RunnableConfig, run_manager: Any = None, **kwargs: Any) -> Any:
        make = partial(self._aexecute, partial(self._acall, args, kwargs, config, run_manager))
        key = self._key(args, kwargs)
        if self.cache is None or key is None:
            return await make()
        return self._from_cache(*await self.cache.aget(key, make, _may_be_kept))

    def _execute(self, call: Callable[[], Any]) -> Any:
        retrying, tries = Retrying(**self._policy), _Tries()

        def attempt() -> Any:
            tries.made += 1
            return call()

        with self._accounted(tries):
            result = retrying(attempt) if self.timeout is None else run_within(self.timeout, retrying, attempt, of=self)
        return self._redacted(result)

    async def _aexecute(self, call: Callable[[], Awaitable[Any]]) -> Any:
        retrying, tries = AsyncRetrying(**self._policy), _Tries()

        async def attempt() -> Any:
            tries.made += 1
            return await call()

        with self._accounted(tries):
            work: Awaitable[Any] = retrying(attempt)
            result = await (work if self.timeout is None else arun_within(self.timeout, work, of=self))
        return self._redacted(result)

    @contextmanager
    def _accounted(self, tries: _Tries) -> Iterator[None]:
        """A call with all its tries: counted however it ends, its errors in words and without secrets."""
        began = time.perf_counter()
        end: CallEnd = "error"
        least = 1
        try:
            yield
            end = "ok"
        except NotCalledError as error:
            least = tries.made = 0
            raise ToolException(f"{self.name}: {error}.") from None
        except DeadlineError:
            end = "timeout"
            raise self._too_late() from None
        except Exception as error:
            self._raise_redacted(error)
            raise
        finally:
            made = max(least, tries.made)
            cost = amount_of((self.metadata or {}).get("cost")) or 0.0  # a key of somebody else's counts as none
            self.meter.add(end, seconds=time.perf_counter() - began, cost=cost * made, retries=max(0, made - 1))

    def _key(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
        """What the result of a pure tool depends on; `None` where an argument has no canonical form."""
        if self.cache is None:
            return None
        try:
            return self.name, json.dumps([args, kwargs], sort_keys=True, default=_canonical)
        except (TypeError, ValueError, RecursionError):
            return None

    def _from_cache(self, result: Any, cached: bool) -> Any:
        if not cached:
            return result
        self.meter.add("cached")
        # Whoever gets it may change it, but the artifact is shared.
        if self.response_format == "content_and_artifact" and isinstance(result, tuple) and len(result) == 2:
            return (copy.deepcopy(result[0]), result[1])
        return copy.deepcopy(result) if isinstance(result, list | dict) else result

    def _redacted(self, result: Any) -> Any:
        return result if self.redactor is None else self.redactor.value(result)

    def _raise_redacted(self, error: Exception) -> None:
        """Raise the error without its secrets; return where it holds none."""
        cleaned = error if self.redactor is None else self.redactor.error(error)
        if cleaned is error:
            return
        if isinstance(cleaned, ToolException | GraphBubbleUp | InfrastructureError):
            raise cleaned from None
        raise ToolException(f"{type(error).__name__}: {cleaned}") from None

    def _too_late(self) -> ToolException:
        return ToolException(f"{self.name} gave no result within {self.timeout:g} seconds and was abandoned.")


@dataclass
class _Tries:
    """Counted where they are made: with a time limit that is another thread, whose own sums nothing else sees."""

    made: int = 0


def _check(
    tool: BaseTool, timeout: float | None, retries: int, idempotent: bool, cache: ResultCache[Any] | None
) -> None:
    if not isinstance(tool, BaseTool):
        raise ConfigurationError(
            f"InstrumentedTool(tool={tool!r}): it must be a LangChain tool; decorate it with @tool."
        )
    if timeout is not None and not timeout > 0:
        raise ConfigurationError(f"InstrumentedTool(timeout={timeout!r}): it must be more than 0 seconds, or None.")
    if not retries >= 0:
        raise ConfigurationError(f"InstrumentedTool(retries={retries!r}): it must be 0 or more.")
    if retries and not idempotent:
        raise ConfigurationError(
            f"InstrumentedTool(retries={retries!r}) for {tool.name!r}: only a tool that may safely be called twice is "
            "called again; declare it with idempotent=True."
        )
    if cache is not None and (given := injected(tool)):
        raise ConfigurationError(
            f"InstrumentedTool(cache=...) for {tool.name!r}: its result may depend on {sorted(given)!r}, which the "
            "graph injects; only a tool that depends on nothing but its arguments can be cached."
        )


def _terms(tool: BaseTool, cost: float | None, repeatable: bool | None) -> dict[str, Any]:
    declared = {"cost": cost, "repeatable": repeatable}
    return {**(tool.metadata or {}), **{name: value for name, value in declared.items() if value is not None}}


def _may_be_kept(result: Any) -> bool:
    """A message answers one call, and a command changes the state of one run."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return not any(isinstance(part, ToolMessage | Command) for part in parts)


def _canonical(value: object) -> Any:
    if isinstance(value, BaseModel):
        return [type(value).__name__, value.model_dump(mode="json")]
    raise TypeError(f"{type(value).__name__} has no canonical form")


CallEnd = Literal["ok", "error", "timeout", "cached"]
_KEPT = 1_000


@dataclass(frozen=True, kw_only=True)
class ToolUsage:
    """The sums at one moment."""

    calls: int = 0
    """All of them; `ok`, `errors`, `timeouts` and `cached` add up to it."""
    ok: int = 0
    errors: int = 0
    timeouts: int = 0
    cached: int = 0
    """Answered from the cache, or by the same call that was under way; whoever waited for one that failed is not
    counted."""
    retries: int = 0
    """Further tries, within the calls above."""
    seconds: float = 0.0
    """Of all calls but the cached ones."""
    cost: float = 0.0
    """Declared price of the same, each try counted."""
    seconds_p50: float = 0.0
    """Of the last 1,000 calls that were not cached, as `seconds_p95`."""
    seconds_p95: float = 0.0


class UsageMeter:
    """Adds up the calls; several tools, and many threads, may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def add(self, end: CallEnd, *, seconds: float = 0.0, cost: float = 0.0, retries: int = 0) -> None:
        """Count one call."""
        with self._lock:
            self._ends[end] += 1
            self._retries += retries
            if end != "cached":
                self._seconds += seconds
                self._cost += cost
                self._latest.append(seconds)

    def read(self) -> ToolUsage:
        """Return the sums so far."""
        with self._lock:
            ends, latest = dict(self._ends), sorted(self._latest)
            return ToolUsage(
                calls=sum(ends.values()),
                ok=ends["ok"],
                errors=ends["error"],
                timeouts=ends["timeout"],
                cached=ends["cached"],
                retries=self._retries,
                seconds=self._seconds,
                cost=self._cost,
                seconds_p50=_quantile(latest, 0.50),
                seconds_p95=_quantile(latest, 0.95),
            )

    def reset(self) -> None:
        """Begin at zero."""
        with self._lock:
            self._ends: dict[CallEnd, int] = {"ok": 0, "error": 0, "timeout": 0, "cached": 0}
            self._retries = 0
            self._seconds = 0.0
            self._cost = 0.0
            self._latest: deque[float] = deque(maxlen=_KEPT)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
