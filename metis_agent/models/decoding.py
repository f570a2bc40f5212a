"""Decoding a batch of rows that end at different lengths: rows that have ended leave the batch.

transformers' own loop runs every row until the longest has ended; in rollouts, where a call takes eight tokens and an
answer twenty, half of its work is on rows that are finished. For models with full attention in every layer, whose
cache can be taken apart row by row; the others decode by `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from metis_agent.models.sampler import TokenChooser

__all__ = ["decode", "left_padded", "prefilled"]

_LEAVING = 4
"""Rows leave once one in so many has ended: taking the cache apart costs about as much as a step."""


def left_padded(prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (B, P)."""
    width = max(map(len, prompts))
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
    ids_UP, mask_UP = left_padded(list(distinct), pad_id, model.device)
    if ids_UP.shape[1] == 1:
        return cache
    ids_UP, mask_UP = ids_UP[:, :-1], mask_UP[:, :-1]
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


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    *,
    pad_id: int,
    steps: int,
    look_every: int,
    chooser: TokenChooser,
    ended: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Choose tokens for every row until all have ended.

    Args:
        model: A causal LM whose layers all have full attention.
        prompts: One a row.
        pad_id: What stands left of shorter prompts, and right of shorter completions.
        steps: The most tokens of a row.
        look_every: Steps between two looks at what has ended: each waits for the device.
        chooser: Chooses them; rows that leave are taken out of it.
        ended: Given the rows of the batch as indices of `prompts` (A), and their tokens so far (A, T), says which of
            them have ended (A).

    Returns:
        Tokens (B, T), and the two log-probabilities of each (B, T, 2). After its end a row may go on for some tokens.
    """
    cache = prefilled(model, prompts, pad_id)
    ids_BP, mask_BP = left_padded(prompts, pad_id, model.device)
    B, width = ids_BP.shape
    mask = torch.cat([mask_BP, mask_BP.new_ones(B, steps)], dim=1)
    tokens_BT = ids_BP.new_full((B, steps), pad_id)
    log_probs_BT2 = torch.zeros(B, steps, 2, device=ids_BP.device)
    rows, last, position = torch.arange(B, device=ids_BP.device), ids_BP[:, -1:], mask_BP.sum(dim=1, keepdim=True) - 1
    step = 0
    # Of no use on a CPU, where it takes its time at every token.
    optimized = nullcontext if model.device.type == "cpu" else getattr(model, "_optimize_model_for_decode", nullcontext)
    with optimized():
        for step in range(1, steps + 1):
            logits = model(
                input_ids=last, attention_mask=mask[:, : width + step - 1], position_ids=position,
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip
            chosen, log_probs = chooser.choose(logits.float())
            tokens_BT[rows, step - 1], log_probs_BT2[rows, step - 1] = chosen, log_probs
            last, position = chosen[:, None], position + 1
            if step % look_every:
                continue
            ended_A = ended(rows, tokens_BT[rows, :step])
            going = (~ended_A).nonzero()[:, 0]
            if not len(going):
                break
            if _LEAVING * len(going) <= (_LEAVING - 1) * len(rows):
                rows, last, position, mask = rows[going], last[going], position[going], mask[going]
                cache.batch_select_indices(going)
                chooser.keep(going.tolist())
    return tokens_BT[:, :step], log_probs_BT2[:, :step]
