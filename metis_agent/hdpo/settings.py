"""How to train: what can be set about a gate, its reader and a cold start.

Plain data without numpy or torch, so that a command line can be made of it (`metis_agent.cli.training_options`): the
names, defaults and words of `metis train`'s options are these. `hdpo.config` has the same for HDPO on a whole model,
on top of TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError

__all__ = ["GateTraining", "GradientTraining", "SftSettings"]


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """How to train.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    beta: float = 0.02
    """Accuracy that may be given up on a question to save a call, at most."""
    trust: float | None = None
    """How far differences between questions in a tool's estimated accuracy count, in [0, 1]; by default 1. Where
    every question has a draft, the direct accuracy is known much better than the tool's: then 0.5, unless the records
    of an only tool say by two nats of likelihood that 1 tells better which branch is right."""
    drafted: bool = False
    """The gate will read a draft of every question. Questions that were recorded without one then teach how often the
    tools are right, and nothing about the direct answer: without a draft their words have to explain too much of it."""
    folds: int | None = None
    """For the held-out estimates: so many fits and one more; by default 5, and 2 of 20,000 questions or more."""
    strengths: Sequence[float] | None = None
    """Candidates for how closely to fit; the best by held-out log loss at its own temperature is taken, one for all
    branches. By default `gate_trainer.STRENGTHS`, and 1 alone of 20,000 questions or more."""
    seed: int = 0
    """The same seed gives the same result."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ConfigurationError(f"beta={self.beta!r}: an accuracy in [0, 1), such as 0.02.")
        if self.trust is not None and not 0 <= self.trust <= 1:
            raise ConfigurationError(f"trust={self.trust!r}: a share in [0, 1].")
        if self.folds is not None and self.folds < 2:
            raise ConfigurationError(f"folds={self.folds!r}: at least 2; 5 is usual.")
        if self.strengths is not None and (not self.strengths or min(self.strengths) <= 0):
            raise ConfigurationError(f"strengths={self.strengths!r}: one or more, above 0.")


@dataclass(frozen=True, kw_only=True)
class GradientTraining:
    """How a fit goes.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    epochs: int = 10
    """At most."""
    batch_size: int = 16
    learning_rate: float = 3e-5
    """Of AdamW; falls linearly to 0 over `epochs`."""
    weight_decay: float = 0.01
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises."""
    patience: int = 2
    """Epochs without a lower held-out loss after which it stops."""
    held_out: float = 0.15
    """Share of the groups of questions that decide when to stop; at least 0 (never stop early), below 1."""
    clip: float = 1.0
    """Of the gradient's norm."""
    seed: int = 0
    resume: Path | None = None
    """Folder for the state after each epoch; a fit found in it goes on from there. None keeps nothing."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: at least 1.")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"learning_rate={self.learning_rate!r}: above 0; 3e-5 is usual for an encoder.")
        if not 0 <= self.held_out < 1:
            raise ConfigurationError(f"held_out={self.held_out!r}: a share of the questions in [0, 1), such as 0.15.")

    def describe(self) -> dict[str, Any]:
        """Everything but where the state is kept."""
        return {name: value for name, value in asdict(self).items() if name != "resume"}


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """How to fine-tune; the defaults are for a model of billions of parameters.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    epochs: float = 2.0
    """Passes over the data."""
    max_steps: int = -1
    """Updates; where 1 or more, they end the run, whatever the epochs."""
    learning_rate: float = 1e-5
    """Of AdamW, with warm-up and a linear decay."""
    batch: int = 8
    """Rows a device and step."""
    accumulation: int = 1
    """Such steps in one update."""
    warmup: float = 0.03
    """Share of the updates in which the learning rate rises."""
    max_length: int | None = 8_192
    """Tokens; what is longer is left out and counted."""
    seed: int = 0
    """The same seed gives the same result."""
    lora: int = 0
    """Rank of LoRA adapters; 0 trains all weights."""
    checkpoint_every: int = 200
    """Updates; what a killed run loses at most."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: slower, in less memory."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of TRL's SFTConfig."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch", "accumulation", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"SftSettings({name}={getattr(self, name)!r}): it must be more than 0.")
        if not 0 <= self.warmup < 1 or self.lora < 0:
            raise ConfigurationError(f"{self!r}: warmup is a share below 1, lora 0 or more.")
