"""A running batch, decoded row by row: rows leave when they have ended, and others join in the meantime.

transformers' own loop runs every row until the longest has ended; in rollouts, where a call takes eight tokens and an
answer twenty, half of its work is on rows that are finished. Its continuous batching (paged, CUDA only) knows no row's
own seed, forced opening, ban or second log-probability. For models with full attention in every layer, whose cache can
be taken apart and put together row by row; the others decode as `generating` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from metis_agent.models.sampler import RowSampling, TokenChooser

__all__ = ["RunningBatch", "left_padded", "prefilled"]


def left_padded(
    prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device, *, at_least: int = 1
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, P), where P is the length of the longest prompt, or `at_least`."""
    width = max(at_least, *map(len, prompts))
    pads = [width - len(prompt_ids) for prompt_ids in prompts]
    rows = [(*[pad_id] * pad, *prompt_ids) for pad, prompt_ids in zip(pads, prompts, strict=True)]
    ids_BP = torch.tensor(rows, dtype=torch.long, device=device)
    first_B1 = torch.tensor(pads, device=device)[:, None]
    return ids_BP, (torch.arange(width, device=device) >= first_B1).long()


@torch.no_grad()
def prefilled(model: Any, prompts: Sequence[tuple[int, ...]], pad_id: int) -> DynamicCache:
    """The cache of all prompts but for their last tokens, one row each; equal prompts are run once."""
    cache = DynamicCache(config=model.config)
    distinct = {ids: row for row, ids in enumerate(dict.fromkeys(prompts))}
    # Of prompts of one token a masked column is run, so that every cache has keys that others can join.
    ids_UP, mask_UP = (each[:, :-1] for each in left_padded(list(distinct), pad_id, model.device, at_least=2))
    model.get_decoder()(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        position_ids=(mask_UP.cumsum(dim=-1) - 1).clamp_(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    if len(distinct) < len(prompts):
        cache.batch_select_indices(torch.tensor([distinct[ids] for ids in prompts], device=ids_UP.device))
    return cache


class RunningBatch:
    """A rows that are decoded together. All have their next token in the same column; where they begin varies.

    Args:
        model: A causal LM whose layers all have full attention.
        prompts: One a row; there is at least one.
        sampling: How each row's tokens are chosen.
        pad_id: What stands left of shorter prompts.
        steps: The most tokens that any row is going to get.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[tuple[int, ...]],
        sampling: Sequence[RowSampling],
        *,
        pad_id: int,
        steps: int,
    ) -> None:
        self._model = model
        self._chooser = TokenChooser(sampling, model.device)
        self._cache: Any = prefilled(model, prompts, pad_id)
        ids_AP, mask_AP = left_padded(prompts, pad_id, model.device, at_least=2)
        self._last_A1 = ids_AP[:, -1:]
        self._position_A1 = mask_AP.sum(dim=1, keepdim=True) - 1
        self._width = ids_AP.shape[1]
        # Columns to come are there from the start: to lengthen a mask at every token costs more than to slice it.
        self._mask_AM = pad(mask_AP, (0, steps), value=1)

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """Each row's next token (A), and its two log-probabilities (A, 2)."""
        model = self._model
        # Of no use on a CPU, where it takes its time at every token.
        on_cpu = model.device.type == "cpu"
        with nullcontext() if on_cpu else getattr(model, "_optimize_model_for_decode", nullcontext)():
            logits_A1V = model(
                input_ids=self._last_A1, attention_mask=self._mask_AM[:, : self._width],
                position_ids=self._position_A1, past_key_values=self._cache, use_cache=True,
            ).logits  # fmt: skip
        chosen_A, log_probs_A2 = self._chooser.choose(logits_A1V[:, -1].float())
        self._last_A1, self._position_A1 = chosen_A[:, None], self._position_A1 + 1
        self._width += 1
        return chosen_A, log_probs_A2

    def keep(self, rows_A: Tensor) -> None:
        """Go on with these rows only (at least one), and without the columns that none of them uses."""
        self._chooser.keep(rows_A.tolist())
        self._last_A1, self._position_A1 = self._last_A1[rows_A], self._position_A1[rows_A]
        first = self._width - 1 - int(self._position_A1.max())
        self._mask_AM, self._width = self._mask_AM[rows_A, first:], self._width - first
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows_A, :, first:], layer.values[rows_A, :, first:]

    def join(self, other: RunningBatch) -> None:
        """Take another batch's rows in, behind those that are there."""
        self._chooser.join(other._chooser)
        self._last_A1 = torch.cat([self._last_A1, other._last_A1])
        self._position_A1 = torch.cat([self._position_A1, other._position_A1])
        ahead = max(it._mask_AM.shape[1] - it._width for it in (self, other))
        left, other_left = (max(0, it) for it in (other._width - self._width, self._width - other._width))
        for ours, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            ours.keys = torch.cat([pad(ours.keys, (0, 0, left, 0)), pad(theirs.keys, (0, 0, other_left, 0))])
            ours.values = torch.cat([pad(ours.values, (0, 0, left, 0)), pad(theirs.values, (0, 0, other_left, 0))])
        used = [
            pad(self._mask_AM[:, : self._width], (left, 0)),
            pad(other._mask_AM[:, : other._width], (other_left, 0)),
        ]
        self._mask_AM = pad(torch.cat(used), (0, ahead), value=1)
        self._width += left
