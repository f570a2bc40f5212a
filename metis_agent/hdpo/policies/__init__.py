"""What a gate's policy is to the trainer: something that reads questions and puts out one logit a head.

Where it stands: `gate_trainer` decides what the heads learn, a policy how. Another policy (an encoder, a chat
model) implements `Policy`, and a scorer of the same `kind` in `metis_agent.gates.scorers` serves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.settings import GateTraining
from metis_agent.rollouts.outcomes import OutcomeTable

__all__ = ["FittedPolicy", "Policy", "PreparedPolicy", "SavesFiles", "Traits", "traits_of"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the trainer has to know of a policy beside its heads."""

    searches_strength: bool = True
    """False where it finds by itself how closely to fit, so that one fit a fold is enough."""
    reads_drafts: bool = True
    counts_calls: bool = False
    """True where a head behind the actions' can say what is still to come; see `Contrast.to_come`."""

    def check(self, training: GateTraining) -> None:
        """Refuse what has been set and would be passed over.

        Raises:
            ConfigurationError: it is nothing to such a policy.
        """
        if training.drafted and not self.reads_drafts:
            raise ConfigurationError("drafted=True with a policy that reads no drafts: train FeaturesPolicy().")
        if training.strengths and not self.searches_strength:
            raise ConfigurationError(
                f"strengths={training.strengths!r} with a policy that chooses its own: leave it out."
            )


def traits_of(policy: Policy) -> Traits:
    """Its `traits`, or the defaults."""
    traits: Traits = getattr(policy, "traits", Traits())
    return traits


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
            targets: [n, H] of any number of heads, in [0, 1]; NaN where a row teaches a head nothing, to policies that
                read drafts.
            strength: [H], how far the rows outweigh the prior: higher fits closer.
        """


class Policy(Protocol):
    """A kind of policy."""

    @property
    def kind(self) -> str:
        """What `gate.json` calls it."""

    def prepare(self, table: OutcomeTable) -> PreparedPolicy:
        """Read the table."""


@runtime_checkable
class SavesFiles(Protocol):
    """A fitted policy with files of its own, such as a model's weights and tokenizer."""

    def save(self, folder: Path, temperatures: NDArray[np.float64]) -> None:
        """Write them, flat, into the artefact's folder.

        Args:
            folder: It exists.
            temperatures: [H], that the logits of the heads are divided by.
        """
