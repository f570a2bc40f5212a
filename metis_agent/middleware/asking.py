"""Doing what a step asks for: the gate is asked for decisions, the model for replies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any

from langchain.agents.middleware.types import ExtendedModelResponse, ModelRequest, ModelResponse

from metis_agent.gates.asking import adecided, decided
from metis_agent.gates.base import Gate
from metis_agent.types import GateRequest

__all__ = ["Step", "adrive", "drive"]

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
