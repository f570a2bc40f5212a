"""What a gate's policy is to the trainer: something that reads questions and puts out one logit a head.

Where it stands: `gate_trainer` decides what the heads learn, a policy how. Another policy (an encoder, a chat
model) implements `Policy`, and a scorer of the same `kind` in `metis_agent.gates.policy` serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from metis_agent.hdpo.outcomes import OutcomeTable

__all__ = ["FittedPolicy", "Policy", "PreparedPolicy"]


class FittedPolicy(Protocol):
    """A trained policy."""

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n, H]: of rows of the table that it was prepared from."""

    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Weights, for the artefact."""

    def config(self) -> Mapping[str, Any]:
        """What JSON can hold of the rest, for the artefact."""


class PreparedPolicy(Protocol):
    """A policy that has read a table (hashed, tokenised) once, to be fitted to many parts of it."""

    def fit(self, rows: NDArray[np.int64], targets: NDArray[np.float64], strength: NDArray[np.float64]) -> FittedPolicy:
        """Fit heads by the log loss.

        Args:
            rows: [n], of the table.
            targets: [n, H], in [0, 1].
            strength: [H], how far the rows outweigh the prior: higher fits closer.
        """


class Policy(Protocol):
    """A kind of policy."""

    @property
    def kind(self) -> str:
        """What `gate.json` calls it."""

    def prepare(self, table: OutcomeTable) -> PreparedPolicy:
        """Read the table."""
