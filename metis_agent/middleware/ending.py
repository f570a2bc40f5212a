"""The end of a turn: the gate is told of it, and it goes to the trajectory store."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from metis_agent.gates.base import Gate
from metis_agent.graphs.setup import current_run_id
from metis_agent.middleware.ledger import Ledger
from metis_agent.middleware.turn import TurnView
from metis_agent.recording.recorder import Recorder
from metis_agent.types import Branch

__all__ = ["Ending"]

logger = logging.getLogger(__name__)


class Ending:
    """Ends turns.

    Args:
        gate: what has decided; one that keeps count is told.
        recorder: writes trajectories.
        ledger: forgets the turn.
    """

    def __init__(self, gate: Gate, recorder: Recorder | None, ledger: Ledger) -> None:
        self._gate = gate
        self._recorder = recorder
        self._ledger = ledger

    def end(self, view: TurnView) -> None:
        """End a turn that has been answered.

        Raises:
            StorageError: the store can't be written to.
        """
        state = view.recorded()
        self._ledger.forget(view.turn)
        try:
            self._gate.after_turn(state["messages"], view.decisions, view.outcomes)
        except Exception:
            logger.exception("Gate %s could not take note of a turn", self._gate.name)
        self._record(state)

    def fail(self, view: TurnView, error: Exception) -> None:
        """Store what there is of a turn that `error` ends; the caller raises that error, whatever happens here."""
        if not self._ledger.fails_first(view.turn):
            return
        try:
            self._record(view.recorded(), error)
        except Exception:
            logger.exception("A failed turn could not be recorded")

    def _record(self, state: Mapping[str, Any], error: Exception | None = None) -> None:
        if self._recorder is None:
            return
        branch: Branch = getattr(self._gate, "branch", "free")
        self._recorder.record(state, run_id=current_run_id(), branch=branch, error=error)
