"""Doing what a step asks for: the gate is asked for decisions, the model for replies.

The gate is asked within its time; where it fails, the model decides, and the decision says so, as in
`metis_agent.graphs.gate_node`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator
from dataclasses import replace
from typing import Any

from langchain.agents.middleware.types import ExtendedModelResponse, ModelRequest, ModelResponse
from langgraph.errors import GraphBubbleUp

from metis_agent.deadline import DeadlineError, arun_within, run_within
from metis_agent.gates.base import Gate, offered_only
from metis_agent.gates.baselines import ModelGate
from metis_agent.types import GateDecision, GateRequest

__all__ = ["Step", "adrive", "drive"]

logger = logging.getLogger(__name__)

Step = Generator[GateRequest | ModelRequest[Any], Any, ExtendedModelResponse[Any]]
"""Yields a `GateRequest` and is sent a `GateDecision`, or a `ModelRequest` and is sent a `ModelResponse`."""


def drive(
    step: Step,
    gate: Gate,
    limit: float | None,
    handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
) -> ExtendedModelResponse[Any]:
    """Run a step to its end.

    Args:
        step: the step.
        gate: what decides.
        limit: seconds for a decision; `None` for no limit.
        handler: asks the model; an error goes to the step, which may live with it.
    """
    try:
        wanted = next(step)
        while True:
            try:
                answer: Any = decided(gate, wanted, limit) if isinstance(wanted, GateRequest) else handler(wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        response: ExtendedModelResponse[Any] = end.value
        return response


async def adrive(
    step: Step,
    gate: Gate,
    limit: float | None,
    handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
) -> ExtendedModelResponse[Any]:
    """Run a step to its end without blocking the event loop."""
    try:
        wanted = next(step)
        while True:
            try:
                if isinstance(wanted, GateRequest):
                    answer: Any = await adecided(gate, wanted, limit)
                else:
                    answer = await handler(wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        response: ExtendedModelResponse[Any] = end.value
        return response


def decided(gate: Gate, request: GateRequest, limit: float | None) -> GateDecision:
    """The gate's decision, or the model's where the gate fails."""
    try:
        decision = gate.decide(request) if limit is None else run_within(limit, gate.decide, request)
        return offered_only(decision, request)
    except GraphBubbleUp:
        raise
    except Exception as error:
        return _fall_back(gate, request, limit, error)


async def adecided(gate: Gate, request: GateRequest, limit: float | None) -> GateDecision:
    """The same without blocking the event loop."""
    try:
        deciding = gate.adecide(request)
        return offered_only(await (deciding if limit is None else arun_within(limit, deciding)), request)
    except GraphBubbleUp:
        raise
    except Exception as error:
        return _fall_back(gate, request, limit, error)


def _fall_back(gate: Gate, request: GateRequest, limit: float | None, error: Exception) -> GateDecision:
    name = gate.name or type(gate).__name__
    what = f"the gate failed with {type(error).__name__}: {error}"
    if isinstance(error, DeadlineError):
        what = f"the gate did not decide within {limit:g} seconds"
    reason = f"{what}; the model decides"
    logger.warning("Gate %s: %s", name, reason)
    return replace(ModelGate().decide(request), gate=name, version=gate.version, reason=reason)
