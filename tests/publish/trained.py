"""A small trained gate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable

ROWS = 120


def train(folder: Path, *, metrics: Mapping[str, Any], description: str) -> Path:
    row = np.arange(ROWS)
    hard = row % 2 == 1
    table = OutcomeTable(
        questions=tuple(f"Who won the {i} cup?" if hard[i] else f"Say hello to {i}" for i in row),
        actions=("direct", "search"),
        correct=np.stack([np.where(row % 11 == 0, hard, ~hard), row % 7 != 0], axis=1).astype(np.float64),
        cost=np.tile([0.0, 1.0], (ROWS, 1)),
        seconds=np.full((ROWS, 2), np.nan),
    )
    trained = train_gate(table, GateTraining(folds=2))
    write_artefact(trained, folder, table=table, metrics=metrics, descriptions={"search": description})
    return folder
