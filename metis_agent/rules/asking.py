"""Asking a gate: within its time, held to what was on offer, and with the model's own choice where it fails.

Whatever stands between a gate and an agent asks here, so that a failing gate means the same thing everywhere: the
model decides, and the decision says why.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from langgraph.errors import GraphBubbleUp

from metis_agent.deadline import DeadlineError, arun_within, run_within
from metis_agent.gates.base import Gate, offered_only
from metis_agent.gates.baselines import ModelGate
from metis_agent.types import GateDecision, GateRequest

__all__ = ["adecided", "decided"]

logger = logging.getLogger(__name__)

_MODEL = ModelGate()


def decided(gate: Gate, request: GateRequest, limit: float | None) -> GateDecision:
    """The gate's decision, or the model's where the gate fails or takes longer than `limit` seconds."""
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
    return replace(_MODEL.decide(request), gate=name, version=gate.version, reason=reason)
