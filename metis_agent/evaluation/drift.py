"""Are today's questions like those that a gate was calibrated on? Its scores of both, side by side.

Where it stands: after `calibration`, in service. `metis calibrate` keeps a sample of the scores with the gate;
`calibration.drift` compares others with it. No outcomes are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.evaluation.calibration import Drift, drift
from metis_agent.evaluation.gates import Scored
from metis_agent.gates.artefact import Artefact

__all__ = ["drift_since_calibration", "reference_note"]

_KEPT = 1000
"""Scores kept of each column: evenly spaced ranks, so the distribution function is off by at most 1/2000."""


def reference_note(scored: Scored, tools: Sequence[str]) -> dict[str, Any]:
    """What `gate.json` keeps of the questions calibrated on."""
    columns = np.sort(_columns(scored), axis=0)
    rows = np.arange(len(columns))
    if len(rows) > _KEPT:
        rows = np.round((np.arange(_KEPT) + 0.5) * len(columns) / _KEPT - 0.5).astype(np.int64)
    return {"columns": list(_names(tools)), "values": columns[rows].T.tolist()}


def drift_since_calibration(artefact: Artefact, scored: Scored, *, level: float = 0.01) -> Drift | None:
    """Compare today's questions with those calibrated on; `None` where the gate was not calibrated by `metis`.

    The scores of its training questions would not do: each comes from a fold's gate, not from this one.

    Args:
        artefact: The gate's.
        scored: Its scores of today's questions.
        level: False alarms, of all checks without drift.

    Raises:
        InputError: fewer than 20 questions on a side.
    """
    note = artefact.description["threshold"].get("reference")
    if note is None:
        return None
    reference = np.array(note["values"], dtype=np.float64).T
    return drift(reference, _columns(scored), _names(artefact.tools), level=level)


def _columns(scored: Scored) -> NDArray[np.float64]:
    # Rounded on both sides: how near 1 a sure gate comes is no drift.
    return np.asarray(np.column_stack([scored.direct_right, scored.probabilities]).round(5), dtype=np.float64)


def _names(tools: Sequence[str]) -> tuple[str, ...]:
    return ("direct answer is right", *(f"{tool} is worth calling" for tool in tools))
