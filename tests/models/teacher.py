"""The plain definition that recorded log-probabilities are checked against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def teacher_forced(
    policy: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """Log-probability of each completion token in one plain forward pass, without padding or cache."""
    ids_1L = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logits_TV = policy(ids_1L, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    log_probs_TV = (logits_TV / temperature).log_softmax(dim=-1)
    chosen: list[float] = log_probs_TV[range(len(completion_ids)), list(completion_ids)].tolist()
    return chosen
