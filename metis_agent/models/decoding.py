"""A running batch, decoded row by row, and the choice of each token, with its log-probability.

Rows leave when they have ended, and others join in the meantime. transformers' own loop runs every row until the
longest has ended; in rollouts, where a call takes eight tokens and an answer twenty, half of its work is on rows that
are finished. Its continuous batching (paged, CUDA only) knows no row's own seed, forced opening, ban or second
log-probability. For models with full attention in every layer, whose cache can be taken apart and put together row by
row; for the others `engine` gives the chooser to `generate` as its one logits processor, which leaves only its choice
finite, so that greedy mode picks it. Sampling is by inverse CDF with one uniform a token from a generator of the row's
own: the same seed gives the same tokens whatever else is in the batch.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessor

from metis_agent.errors import ConfigurationError

__all__ = ["RowSampling", "RunningBatch", "TokenChooser", "left_padded", "prefilled"]


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


def cache_argument(model: Any) -> str:
    """What its `forward` calls the cache: until transformers 5.23 it was `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.get_decoder().forward).parameters else "past_key_values"


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
        use_cache=True,
        **{cache_argument(model): cache},
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
        self._cache_argument = cache_argument(model)
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
                position_ids=self._position_A1, use_cache=True, **{self._cache_argument: self._cache},
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


# The largest uniform: float32 rounding must not carry it to the very end of the CDF.
_BELOW_ONE = 1.0 - 2.0**-22


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How the tokens of one row are chosen."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int = 0
    forced: tuple[int, ...] = ()
    """The completion's first tokens, whatever the policy thinks of them."""
    banned: tuple[int, ...] = ()
    """Tokens that can't be chosen at any position (forced ones can)."""

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and 0.0 < self.top_p <= 1.0 and self.top_k >= 0):
            raise ConfigurationError(
                f"temperature={self.temperature!r}, top_p={self.top_p!r}, top_k={self.top_k!r}: the rule is "
                "temperature >= 0 (0 is greedy), 0 < top_p <= 1 and top_k >= 0 (0 keeps every token)."
            )


class TokenChooser(LogitsProcessor):
    """Chooses a token for each row of a batch and gives its log-probabilities; rows may join and leave.

    There are two, both log-softmax of the logits at the row's temperature (1 where it is greedy), before top-k, top-p
    and forcing. Among all tokens it is the policy's own, so that a trainer's ratio starts at 1. Among the tokens that
    are not banned it tells how sure the policy is of what it writes, where the ban has taken a decision from it.

    Args:
        rows: One a row of the batch.
        device: Where the scores are.
    """

    def __init__(self, rows: Sequence[RowSampling], device: torch.device) -> None:
        self._generators = [random.Random(row.seed) for row in rows]
        self._device = device
        self.log_probs_B2 = torch.zeros(len(rows), 2, device=device)
        """Of the tokens that were chosen last."""
        self._lay_out(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._generators = [self._generators[row] for row in rows]
        left = self._left()
        self._lay_out([left[row] for row in rows])

    def join(self, other: TokenChooser) -> None:
        """Take another's rows in, behind those that are there."""
        self._generators += other._generators
        self._lay_out([*self._left(), *other._left()])

    def _left(self) -> list[RowSampling]:
        """The rows from the next token on."""
        return [replace(row, forced=row.forced[self._step :]) if row.forced else row for row in self._rows]

    def _lay_out(self, rows: Sequence[RowSampling]) -> None:
        device = self._device
        self._rows, self._step = rows, 0
        temperatures = torch.tensor([row.temperature or 1.0 for row in rows], device=device)
        self._temperature_B1 = None if bool((temperatures == 1.0).all()) else temperatures[:, None]
        sampled = torch.tensor([row.temperature > 0 for row in rows], device=device)
        self._sampled_B = sampled if bool(sampled.any()) else None
        self._all_sampled = bool(sampled.all())
        self._forced_BF = _padded([row.forced for row in rows], device)
        banned = [(index, token) for index, row in enumerate(rows) for token in row.banned]
        self._banned_2N = torch.tensor(banned, device=device).T if banned else None
        truncated = any(row.top_p < 1.0 or row.top_k > 0 for row in rows)
        self._top_k_B1 = torch.tensor([[row.top_k] for row in rows], device=device) if truncated else None
        self._top_p_B1 = torch.tensor([[row.top_p] for row in rows], device=device) if truncated else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) in float32; returned with all but the chosen token at minus infinity."""
        chosen_B, self.log_probs_B2 = self.choose(scores)
        return scores.fill_(-torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens chosen by scores (B, V) in float32: (B,); their log-probabilities, of all, of allowed: (B, 2)."""
        logits = scores if self._temperature_B1 is None else scores / self._temperature_B1
        log_z_B1 = logits.logsumexp(dim=-1, keepdim=True)
        allowed = self._without_banned(logits)
        log_z_B2 = torch.cat([log_z_B1, log_z_B1 if allowed is logits else allowed.logsumexp(-1, keepdim=True)], 1)
        if self._top_k_B1 is not None:
            allowed = self._truncate(allowed)
        if self._sampled_B is None:
            chosen_B = allowed.argmax(dim=-1)
        else:
            chosen_B = self._draw(allowed, log_z_B1)
            if not self._all_sampled:
                chosen_B = torch.where(self._sampled_B, chosen_B, allowed.argmax(dim=-1))
        if self._step < self._forced_BF.shape[1]:
            forced_B = self._forced_BF[:, self._step]
            chosen_B = torch.where(forced_B >= 0, forced_B, chosen_B)
        self._step += 1
        return chosen_B, logits.gather(1, chosen_B[:, None]) - log_z_B2

    def _without_banned(self, logits: Tensor) -> Tensor:
        """The logits with banned tokens at minus infinity."""
        if self._banned_2N is None:
            return logits
        allowed = logits.clone()
        allowed[self._banned_2N[0], self._banned_2N[1]] = -torch.inf
        return allowed

    def _truncate(self, logits: Tensor) -> Tensor:
        """Keep the top k tokens and the smallest set that holds probability p; always the best token."""
        assert self._top_k_B1 is not None
        assert self._top_p_B1 is not None
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0.0
        rank = torch.arange(logits.shape[-1], device=logits.device)
        cut = ((self._top_k_B1 > 0) & (rank >= self._top_k_B1)) | ((self._top_p_B1 < 1.0) & (before >= self._top_p_B1))
        cut[:, 0] = False
        return logits.scatter(1, order, ordered.masked_fill(cut, -torch.inf))

    def _draw(self, allowed: Tensor, log_z_B1: Tensor) -> Tensor:
        """One token a row by inverse CDF; a token of probability zero is never drawn."""
        cdf = (allowed - log_z_B1).exp_().cumsum(dim=-1)
        uniform = torch.tensor(
            [[generator.random()] for generator in self._generators], dtype=cdf.dtype, device=cdf.device
        )
        target = uniform.clamp_(max=_BELOW_ONE) * cdf[:, -1:]
        # right=True: the first token whose CDF exceeds the target, so steps of height zero are passed over.
        return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=cdf.shape[-1] - 1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of token ids (B, F), padded with -1."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.long, device=device).reshape(
        len(rows), width
    )
