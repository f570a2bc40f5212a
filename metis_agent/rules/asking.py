"""Asking a gate: within its time, held to what was on offer, and with the model's own choice where it fails.

Both hosts ask here, so that a failing gate means the same thing everywhere: the model decides, and the decision says
why. A gate that fails again and again is left alone for a while: a hung one would leave a thread behind each time.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from langgraph.errors import GraphBubbleUp

from metis_agent.deadline import DeadlineError, arun_within, run_within
from metis_agent.gates.base import Gate, offered_only
from metis_agent.gates.baselines import ModelGate
from metis_agent.types import GateDecision, GateRequest

__all__ = ["AskedGate"]

logger = logging.getLogger(__name__)

_MODEL = ModelGate()
_FAILURES = 5
_PAUSE = 30.0
_LONGEST_PAUSE = 3600.0


class AskedGate:
    """A gate whose failures are decisions: it never raises, and it never takes longer than its time.

    After five time-outs in a row the gate is not asked for half a minute, then once; if that fails too, the pause
    doubles, up to an hour.

    Args:
        gate: what decides.
        limit: seconds for a decision; `None` for no limit.
    """

    def __init__(self, gate: Gate, limit: float | None = None) -> None:
        self.gate = gate
        self.limit = limit
        self._failures = 0
        self._pause_until = 0.0

    def decide(self, request: GateRequest) -> GateDecision:
        """The gate's decision, or the model's where the gate fails or takes too long."""
        if self._failures >= _FAILURES and self._resting():
            return self._fall_back(request, None)
        gate, limit = self.gate, self.limit
        try:
            decision = gate.decide(request) if limit is None else run_within(limit, gate.decide, request)
            decision = offered_only(decision, request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return self._fall_back(request, error)
        self._failures = 0
        return decision

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` without blocking the event loop."""
        if self._failures >= _FAILURES and self._resting():
            return self._fall_back(request, None)
        try:
            deciding = self.gate.adecide(request)
            decision = await (deciding if self.limit is None else arun_within(self.limit, deciding))
            decision = offered_only(decision, request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return self._fall_back(request, error)
        self._failures = 0
        return decision

    def _resting(self) -> bool:
        """True while the gate is left alone; at the end of a pause one caller is let through."""
        now = time.monotonic()
        if now < self._pause_until:
            return True
        self._pause_until = now + _PAUSE
        return False

    def _fall_back(self, request: GateRequest, error: Exception | None) -> GateDecision:
        gate = self.gate
        name = gate.name or type(gate).__name__
        if error is None:
            what = f"the gate did not decide in time {self._failures} times in a row and is left alone for a while"
        elif isinstance(error, DeadlineError):
            what = f"the gate did not decide within {self.limit:g} seconds"
            self._failures += 1
            if self._failures >= _FAILURES:
                pause = min(_LONGEST_PAUSE, _PAUSE * 2 ** min(self._failures - _FAILURES, 10))
                self._pause_until = time.monotonic() + pause
        else:
            what = f"the gate failed with {type(error).__name__}: {error}"
        reason = f"{what}; the model decides"
        if error is not None:
            logger.warning("Gate %s: %s", name, reason)
        return replace(_MODEL.decide(request), gate=name, version=gate.version, reason=reason)
