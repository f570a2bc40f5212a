"""The rollouts of one step in one process, as TRL takes them: rows of tokens, and an advantage for each row.

Between `policy_rows`, `rewards` and `advantages`, which make the parts, and the trainer, which hands them to TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metis_agent.hdpo.advantages import Channels
from metis_agent.hdpo.policy_rows import Row
from metis_agent.hdpo.rewards import Scores

__all__ = ["StepBatch"]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """P questions with G rollouts each, in R rows."""

    layout: Sequence[Row]
    """The R rows: the first segments of the rollouts, in their order, what they have beyond that, and blank ones."""
    scores: Scores
    channels: Channels
    weights: NDArray[np.float64]
    """[P, G], see `exploration.rollout_weights`."""

    def rollouts(self) -> dict[str, list[Any]]:
        """What TRL's `rollout_func` returns."""
        r_acc = self.scores.r_acc.flatten()
        return {
            "prompt_ids": [list(row.segment.prompt_ids) for row in self.layout],
            "completion_ids": [list(row.segment.completion_ids) for row in self.layout],
            "logprobs": [list(row.segment.log_probs) for row in self.layout],
            "env_mask": [list(row.segment.mask) if row.weight else [0] * len(row.segment.mask) for row in self.layout],
            # A rollout's reward is logged once, with its first segment.
            "r_acc": [
                float(r_acc[place]) if place < len(r_acc) and not np.isnan(r_acc[place]) else None
                for place in range(len(self.layout))
            ],
        }

    def by_row(self, advantages_P_G: Tensor) -> Tensor:
        """Advantages of the rows as TRL takes them: [R]."""
        weighted = advantages_P_G.flatten() * torch.as_tensor(self.weights, dtype=advantages_P_G.dtype).flatten()
        rollouts = torch.tensor([max(row.rollout, 0) for row in self.layout])
        return weighted[rollouts] * torch.tensor([row.weight for row in self.layout])
