"""Stage `replay`, (a) of the paper: run every recorded tool call again, and drop what does not hold.

A call that failed when it was recorded, fails now, or now says something else teaches the model to trust what is not
there. The calls of one tool are run again in their order, in a session of their own, since a Python session
remembers; equal sequences are run once. Calls of tools that can't be re-executed (a web search, an image service)
are let through and counted.
"""

from __future__ import annotations

import re
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool

from metis_agent.curation.pipeline import KEEP, Row, Verdict, drop, keep, undecided
from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.sqlite import DiskCache, content_key
from metis_agent.types import ToolOutcome, Trajectory

__all__ = ["ReplayStage", "same_result"]

_FAILED = {
    "error": "recorded call failed",
    "timeout": "recorded call failed",
    "blocked": "recorded call was not run",
    "repeated": "recorded call was not run",
}


@dataclass(frozen=True, kw_only=True)
class _Result:
    ok: bool
    content: str


class ReplayStage:
    """Drops runs whose tool calls do not come out as recorded.

    Args:
        tools: those that can be re-executed, as the agent had them: safe to call, and saying the same each time.
        cache: results of earlier replays; in memory by default.
        concurrency: trajectories under way at once.
        version: changes when the tools or what they search do; part of the cache's key.
    """

    name = "replay"

    def __init__(
        self,
        tools: Sequence[BaseTool],
        *,
        cache: DiskCache | None = None,
        concurrency: int = 4,
        version: str = "",
    ) -> None:
        if concurrency < 1:
            raise ConfigurationError(f"ReplayStage(concurrency={concurrency!r}): it must be at least 1.")
        self._tools = {tool.name: tool for tool in tools}
        self._cache = DiskCache(None) if cache is None else cache
        self._version, self._concurrency = version, concurrency
        self.settings: Mapping[str, Any] = {"tools": sorted(self._tools), "version": version}
        self.executed = 0
        """Calls that were run."""

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        """As `Stage`."""
        verdicts: dict[int, Verdict] = {}
        sequences: dict[str, tuple[str, list[ToolOutcome]]] = {}
        wanted: dict[int, list[tuple[str, list[ToolOutcome]]]] = {}
        for row in rows:
            verdict = _as_recorded(row.value)
            if verdict is not None:
                verdicts[row.number] = verdict
                continue
            wanted[row.number] = []
            for tool, outcomes in self._by_tool(row.value).items():
                key = content_key(self._version, tool, [outcome.arguments for outcome in outcomes])
                sequences.setdefault(key, (tool, outcomes))
                wanted[row.number].append((key, outcomes))
        results = self._results(sequences)
        for row in rows:
            if row.number not in verdicts:
                verdicts[row.number] = self._compare(row.value, wanted[row.number], results)
        return [verdicts[row.number] for row in rows]

    def _by_tool(self, trajectory: Trajectory) -> dict[str, list[ToolOutcome]]:
        calls: dict[str, list[ToolOutcome]] = defaultdict(list)
        for outcome in trajectory.outcomes:
            if outcome.tool in self._tools:
                calls[outcome.tool].append(outcome)
        return calls

    def _compare(
        self,
        trajectory: Trajectory,
        calls: Sequence[tuple[str, list[ToolOutcome]]],
        results: Mapping[str, list[_Result] | str],
    ) -> Verdict:
        for key, outcomes in calls:
            again = results[key]
            if isinstance(again, str):
                return undecided("tool unavailable", again)
            for outcome, result in zip(outcomes, again, strict=False):
                if not result.ok:
                    return drop("call fails when run again", f"{outcome.tool}: {result.content[-500:]}")
                if not same_result(outcome.content, result.content):
                    detail = f"{outcome.tool}: recorded {outcome.content[:300]!r}, now {result.content[:300]!r}"
                    return drop("result does not match the record", detail)
        replayed = sum(len(outcomes) for _, outcomes in calls)
        return KEEP if replayed == len(trajectory.outcomes) else keep("has calls that can't be re-executed")

    # --- running ---------------------------------------------------------------------------------------------

    def _results(self, sequences: Mapping[str, tuple[str, list[ToolOutcome]]]) -> dict[str, list[_Result] | str]:
        """Results by key; a text says why there are none."""
        kept = self._cache.get_many(sequences)
        found: dict[str, list[_Result] | str] = {
            key: [_Result(ok=True, content=content) for content in contents] for key, contents in kept.items()
        }
        missing = {key: sequence for key, sequence in sequences.items() if key not in found}
        if missing:
            pool = ThreadPoolExecutor(min(self._concurrency, len(missing)), thread_name_prefix="metis-replay")
            try:
                for key, results in zip(missing, pool.map(self._run, missing.values()), strict=True):
                    found[key] = results
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            # Failures are not kept: a machine under load times out where the same code ran before.
            self._cache.put_many(
                {
                    key: [result.content for result in results]
                    for key in missing
                    if not isinstance(results := found[key], str) and all(result.ok for result in results)
                }
            )
        return found

    def _run(self, sequence: tuple[str, list[ToolOutcome]]) -> list[_Result] | str:
        tool, outcomes = sequence
        why = ""
        results: list[_Result] = []
        for _ in range(2):  # a failure is believed when it happens twice
            try:
                results = self._run_once(self._tools[tool], outcomes)
            except InfrastructureError as error:
                results, why = [], f"{type(error).__name__}: {error}"
            else:
                why = ""
                if all(result.ok for result in results):
                    break
        return why or results

    def _run_once(self, tool: BaseTool, outcomes: Sequence[ToolOutcome]) -> list[_Result]:
        config = RunnableConfig(configurable={"thread_id": f"replay-{uuid.uuid4()}"})
        results: list[_Result] = []
        for outcome in outcomes:
            call = {"type": "tool_call", "id": "replay", "name": tool.name, "args": dict(outcome.arguments)}
            self.executed += 1
            try:
                message = tool.invoke(call, config)
            except InfrastructureError:
                raise
            except Exception as error:  # a tool may raise anything, and arguments may not fit its schema
                results.append(_Result(ok=False, content=f"{type(error).__name__}: {error}"))
                break
            text = message.text if isinstance(message, ToolMessage) else str(message)
            failed = isinstance(message, ToolMessage) and message.status == "error"
            results.append(_Result(ok=not failed, content=str(text)))
            if failed:
                break
        return results


def _as_recorded(trajectory: Trajectory) -> Verdict | None:
    """What the record itself says against the calls; `None` where they are to be run."""
    for outcome in trajectory.outcomes:
        if outcome.status in _FAILED:
            return drop(_FAILED[outcome.status], f"{outcome.tool}: {outcome.status}: {outcome.content[:300]}")
    return None if trajectory.outcomes else KEEP


_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")
_DECIMAL = re.compile(r"(?<![\w.])-?\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w.])", re.I)


def same_result(recorded: str, again: str) -> bool:
    """Whether two results of a call are the same: addresses may differ, and decimals in their 9th digit.

    Example:
        >>> same_result("<f at 0x7f00aa001122> 0.30000000000000004", "<f at 0x7f11bb001122> 0.3")
        True
        >>> same_result("1234567890123", "1234567890124")
        False
    """
    if recorded == again:
        return True
    first, second = (_ADDRESS.sub("0x", text.strip().replace("\r\n", "\n")) for text in (recorded, again))
    if _DECIMAL.split(first) != _DECIMAL.split(second):
        return first == second
    numbers = zip(_DECIMAL.findall(first), _DECIMAL.findall(second), strict=True)
    return all(a == b or abs(float(a) - float(b)) <= 1e-9 * max(abs(float(a)), abs(float(b))) for a, b in numbers)
