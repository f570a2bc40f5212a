"""What a gate is: probabilities that each tool is worth calling, and the threshold that makes them a decision.

Where it stands: the first node of every turn asks the gate; the graph then enforces its decision. A gate of
your own overrides `estimate` (or `aestimate`) and leaves the threshold to this class, or overrides `decide`
(or `adecide`) whole. One of the two flavours is enough: the other is derived from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from langchain_core.messages import BaseMessage

from metis_agent.deadline import arun_in_thread, run_async
from metis_agent.errors import ConfigurationError, GateError
from metis_agent.types import GateDecision, GateRequest, ToolOutcome, ToolSpec

__all__ = ["Gate", "SupportsDecide", "allows", "as_gate", "offered_only"]

_R = TypeVar("_R")


def allows(probability: float, threshold: float) -> bool:
    """The tie rule, in one place: a tool is allowed where its probability is *greater* than the threshold.

    A tie answers directly, the cheaper side. So a threshold of 1 never calls a tool, and one of 0 calls each
    tool that has any chance of being needed.
    """
    return probability > threshold


class SupportsDecide(Protocol):
    """The least that can stand where a gate is expected; an async `adecide` in place of `decide` does too."""

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide on one step of a turn."""


class Gate:
    """Base of all gates.

    Args:
        threshold: a tool is allowed where its estimated probability is above this (see `allows`), in [0, 1].
        required: where any tool is allowed, the model has to call one; by default it may still answer.
        name: what decisions and records call this gate; the class name by default.
        version: tells apart trained states of one gate in the records.

    A gate that calls a chat model should tag that call `nostream`, or its tokens show up in `messages` streams.

    Raises:
        ConfigurationError: the threshold is not a number in [0, 1].
    """

    threshold: float = 0.5
    required: bool = False
    name: str = ""
    version: str = ""
    wants_draft: bool = False
    """True where requests should bring a direct draft. It costs a model call, which is the answer where the gate
    then decides to answer."""

    def __init__(self, *, threshold: float = 0.5, required: bool = False, name: str = "", version: str = "") -> None:
        if not 0 <= threshold <= 1:
            raise ConfigurationError(f"The gate's threshold is {threshold!r}; it must be a number in [0, 1].")
        self.threshold = threshold
        self.required = required
        self.name = name or type(self).__name__
        self.version = version

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        """Called when an agent is made: raise `ConfigurationError` where the gate can't decide on its tools."""

    def knows(self, tool: ToolSpec) -> bool:
        """True where the gate can decide on a tool; the others are left to the model."""
        return True

    def after_turn(
        self, messages: Sequence[BaseMessage], decisions: Sequence[GateDecision], outcomes: Sequence[ToolOutcome]
    ) -> None:
        """Called when a turn has been answered, for gates that keep count; from several threads at once.

        Args:
            messages: the conversation, the answer last.
            decisions: the turn's.
            outcomes: the turn's.
        """

    def estimate(self, request: GateRequest) -> Mapping[str, float]:
        """Probability that each tool of the request is worth calling now, by name; one left out counts as 0."""
        raise NotImplementedError(f"{type(self).__name__} implements no sync estimate.")

    async def aestimate(self, request: GateRequest) -> Mapping[str, float]:
        """The same without blocking the event loop."""
        raise NotImplementedError(f"{type(self).__name__} implements no async estimate.")

    def decide(self, request: GateRequest) -> GateDecision:
        """Decide on one step of a turn.

        Raises:
            GateError: an estimate is not a probability.
        """
        if self._overrides("adecide"):
            return run_async(self.adecide, request)
        started = time.perf_counter()
        sync = self._overrides("estimate")
        estimate = self.estimate(request) if sync else run_async(self.aestimate, request)
        return self._apply_threshold(request, estimate, started)

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` for async runs; a gate that is sync only decides in a thread.

        Raises:
            GateError: an estimate is not a probability.
        """
        if self._overrides("decide"):
            return await arun_in_thread(self.decide, request)
        started = time.perf_counter()
        if self._overrides("aestimate"):
            return self._apply_threshold(request, await self.aestimate(request), started)
        estimate = await arun_in_thread(self.estimate, request)
        return self._apply_threshold(request, estimate, started)

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Gate, method)

    def _apply_threshold(self, request: GateRequest, estimate: Mapping[str, float], started: float) -> GateDecision:
        names = [tool.name for tool in request.tools]
        probabilities = {name: _probability(estimate.get(name, 0.0), name) for name in names}
        allowed = tuple(name for name in names if allows(probabilities[name], self.threshold))
        return GateDecision(
            allowed=allowed,
            required=self.required and bool(allowed),
            probabilities=probabilities,
            threshold=self.threshold,
            gate=self.name or type(self).__name__,
            version=self.version,
            seconds=time.perf_counter() - started,
        )


def as_gate(candidate: object) -> Gate:
    """A gate from anything with a `decide` or an `adecide`; a `Gate` is returned as it is.

    Raises:
        ConfigurationError: it implements neither a decision nor an estimate.
    """
    if isinstance(candidate, type):
        raise ConfigurationError(
            f"The gate is the class {candidate.__name__}; pass an instance: {candidate.__name__}()."
        )
    if isinstance(candidate, Gate):
        # Without this, a gate with nothing of its own would fail at every decision, and quietly.
        if any(candidate._overrides(name) for name in ("decide", "adecide", "estimate", "aestimate")):
            return candidate
    elif callable(getattr(candidate, "decide", None)) or callable(getattr(candidate, "adecide", None)):
        return _Adapted(candidate)
    raise ConfigurationError(
        f"{candidate!r} is no gate: a gate implements estimate, aestimate, decide or adecide. "
        "Subclass metis_agent.gates.Gate and implement one of them."
    )


def offered_only(decision: GateDecision, request: GateRequest) -> GateDecision:
    """The decision without tools that were not on offer, in the order of the offer, and in plain values.

    Whoever enforces decisions passes them through here first: a gate may be anybody's code.

    Raises:
        GateError: it is no `GateDecision`, or holds what none can.
    """
    if not isinstance(decision, GateDecision):
        raise GateError(f"it decided {decision!r}, which is no GateDecision")
    chosen, estimates = decision.allowed, decision.probabilities
    if isinstance(chosen, str) or not isinstance(chosen, Collection):
        raise GateError(f"it allowed {chosen!r}; that must be a tuple of tool names")
    if not (isinstance(decision.seconds, int | float) and 0 <= decision.seconds < math.inf):
        raise GateError(f"it took {decision.seconds!r} seconds; that must be a finite number of at least 0")
    if not (isinstance(decision.reason, str) and isinstance(decision.gate, str) and isinstance(decision.version, str)):
        raise GateError(f"its decision {decision!r} has a gate, version or reason that is no text")
    allowed = tuple([tool.name for tool in request.tools if tool.name in chosen])
    if allowed == chosen and estimates is None:
        return decision
    if not (estimates is None or isinstance(estimates, Mapping)):
        raise GateError(f"its probabilities are {estimates!r}; they must map tool names to numbers in [0, 1]")
    return replace(
        decision,
        allowed=allowed,
        required=bool(decision.required and allowed),
        probabilities=None if estimates is None else {name: _probability(p, name) for name, p in estimates.items()},
    )


class _Adapted(Gate):
    """Somebody else's object in a gate's place."""

    def __init__(self, candidate: Any) -> None:
        super().__init__(
            name=str(getattr(candidate, "name", "") or type(candidate).__name__),
            version=str(getattr(candidate, "version", "")),
        )
        self._candidate = candidate
        self.wants_draft = bool(getattr(candidate, "wants_draft", False))
        for method in ("after_turn", "knows"):
            if callable(own := getattr(candidate, method, None)):
                setattr(self, method, own)

    def check_tools(self, tools: Sequence[ToolSpec]) -> None:
        check = getattr(self._candidate, "check_tools", None)
        if check is not None:
            check(tools)

    def decide(self, request: GateRequest) -> GateDecision:
        decide: Callable[[GateRequest], GateDecision] | None = getattr(self._candidate, "decide", None)
        return decide(request) if decide else run_async(self._candidate.adecide, request)

    async def adecide(self, request: GateRequest) -> GateDecision:
        adecide = getattr(self._candidate, "adecide", None)
        if adecide is None:
            return await arun_in_thread(self.decide, request)
        decision: GateDecision = await adecide(request)
        return decision


def _probability(value: Any, tool: str) -> float:
    try:
        probability = float(value)
    except (TypeError, ValueError):
        probability = float("nan")
    if not 0 <= probability <= 1:
        raise GateError(f"The gate's estimate for tool {tool!r} is {value!r}; it must be a number in [0, 1].")
    return probability
