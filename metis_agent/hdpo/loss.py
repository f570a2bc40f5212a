"""The HDPO loss: two clipped surrogates on the same log-probabilities, combined nowhere else.

    L = w_acc L_clip(A_acc) + w_tool L_clip(A_tool)
    L_clip(A) = - aggregate_t min(rho_t A, clip(rho_t, 1 - low, 1 + high) A),   rho_t = exp(log pi_t - log pi_old_t)

Last of `verifiers -> rewards -> advantages -> loss`. Tensors are [B, T]: B sequences, T tokens (or decisions,
for a gate). Source: arXiv:2604.08545; conventions are TRL 1.16's `GRPOTrainer._compute_loss` with token-level
importance weights and no KL term, for `loss_type` "grpo", "bnpo" and "dapo". The division by the number of
accumulated micro-batches, which TRL applies to "grpo" and "bnpo", is the trainer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis_agent.errors import ConfigurationError, InputError

__all__ = ["HDPOLoss", "Normaliser", "Surrogate", "clipped_surrogate", "hdpo_loss"]

Normaliser = Literal["grpo", "bnpo", "dapo", "active"]
"""What the sum over tokens is divided by.

- "grpo": each sequence by its own tokens, then the mean over sequences.
- "bnpo": all tokens of this batch.
- "dapo": `total_tokens`, those of the whole accumulated batch (this batch's where it is not given).
- "active": tokens whose advantage is not zero. The paper's code does this for L_tool, micro-batch by
  micro-batch, so that the fewer rollouts qualify, the more each weighs: the effective price is w_tool /
  (share active).
"""


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """One channel's loss."""

    loss: Tensor
    """Scalar, differentiable in the log-probabilities."""
    clip_fraction: Tensor
    """Scalar: share of unmasked tokens whose gradient the clip removed."""


@dataclass(frozen=True, kw_only=True)
class HDPOLoss:
    """The combined loss and its two channels."""

    loss: Tensor
    acc: Surrogate
    tool: Surrogate


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normaliser: Normaliser = "grpo",
    total_tokens: Tensor | float | None = None,
    correction: Tensor | None = None,
) -> Surrogate:
    """The PPO-clipped surrogate L_clip(A), to be minimised.

    Args:
        log_probs: [B, T], of the sampled tokens under the policy.
        old_log_probs: [B, T], under the policy that sampled them; no gradient flows into it.
        advantages: [B], or [B, T] where they differ by token.
        mask: [B, T], bool or 0/1: what the model itself sampled. Observations, prompts and padding are 0;
            what stands there, NaN included, has no effect.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: And above 1 + clip_high.
        normaliser: See `Normaliser`.
        total_tokens: For "dapo", the divisor: unmasked tokens of the accumulated batch (divided by the
            processes that average their gradients).
        correction: [B, T] or [B, 1], multiplies each token's loss: how much likelier the policy makes it than the
            engine that sampled it.

    Raises:
        ConfigurationError: The clip or the normaliser is not one of those described.
        InputError: Shapes don't fit.
    """
    _check(log_probs, old_log_probs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    mask = mask.bool()
    A = (advantages if advantages.ndim == 2 else advantages[:, None]).expand_as(log_probs)
    # Masked before exp: an infinite ratio times a mask of 0 would be NaN.
    ratio = torch.where(mask, log_probs - old_log_probs.detach(), 0.0).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = torch.where(mask, -torch.minimum(ratio * A, clipped * A), 0.0)
    if correction is not None:
        per_token = torch.where(mask, per_token * correction, 0.0)
    is_clipped = ((ratio < 1 - clip_low) & (A < 0)) | ((ratio > 1 + clip_high) & (A > 0))
    return Surrogate(
        loss=_aggregate(per_token, A, mask, normaliser, total_tokens),
        clip_fraction=(is_clipped & mask).sum() / mask.sum().clamp(min=1),
    )


def hdpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    acc_advantages: Tensor,
    tool_advantages: Tensor,
    mask: Tensor,
    *,
    w_acc: float = 1.0,
    w_tool: float = 0.15,
    clip: tuple[float, float] = (0.2, 0.2),
    tool_clip: tuple[float, float] | None = None,
    normaliser: Normaliser = "grpo",
    tool_normaliser: Normaliser | None = None,
    total_tokens: Tensor | float | None = None,
) -> HDPOLoss:
    """L = w_acc L_clip(A_acc) + w_tool L_clip(A_tool), each channel with its own clip.

    Clipping apart is not clipping the sum: where the channels disagree on the sign, one can be clipped while
    the other still pulls.

    Args:
        log_probs: [B, T].
        old_log_probs: [B, T].
        acc_advantages: A_acc, [B] or [B, T].
        tool_advantages: A_tool, [B] or [B, T]; zero outside Q.
        mask: [B, T].
        w_acc: Weight of the accuracy channel.
        w_tool: Weight of the tool channel; at 0 the loss is GRPO's.
        clip: (low, high) of the accuracy channel.
        tool_clip: (low, high) of the tool channel; the same by default.
        normaliser: Of the accuracy channel.
        tool_normaliser: Of the tool channel; the same by default, so that w_tool is the price whatever the
            share of rollouts that qualify. "active" is the paper's code.
        total_tokens: For "dapo".
    """
    acc_low, acc_high = clip
    tool_low, tool_high = clip if tool_clip is None else tool_clip
    acc = clipped_surrogate(
        log_probs,
        old_log_probs,
        acc_advantages,
        mask,
        clip_low=acc_low,
        clip_high=acc_high,
        normaliser=normaliser,
        total_tokens=total_tokens,
    )
    tool = clipped_surrogate(
        log_probs,
        old_log_probs,
        tool_advantages,
        mask,
        clip_low=tool_low,
        clip_high=tool_high,
        normaliser=tool_normaliser or normaliser,
        total_tokens=total_tokens,
    )
    return HDPOLoss(loss=w_acc * acc.loss + w_tool * tool.loss, acc=acc, tool=tool)


def _aggregate(
    per_token: Tensor, A: Tensor, mask: Tensor, normaliser: Normaliser, total_tokens: Tensor | float | None
) -> Tensor:
    match normaliser:
        case "grpo":
            return (per_token.sum(1) / mask.sum(1).clamp(min=1)).mean()
        case "dapo" if total_tokens is not None:
            # A batch without a token of the model's own has no loss, and no division by zero either.
            return per_token.sum() / torch.as_tensor(total_tokens, device=per_token.device).clamp(min=1e-8)
        case "bnpo" | "dapo":
            return per_token.sum() / mask.sum().clamp(min=1)
        case "active":
            return per_token.sum() / (mask & (A != 0)).sum().clamp(min=1)
    raise ConfigurationError(f"normaliser={normaliser!r}: choose 'grpo', 'bnpo', 'dapo' or 'active'.")


def _check(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> None:
    shape = log_probs.shape
    fits = old_log_probs.shape == shape == mask.shape and advantages.shape in (shape, shape[:1])
    if log_probs.ndim != 2 or not fits:
        shapes = [tuple(tensor.shape) for tensor in (log_probs, old_log_probs, mask, advantages)]
        raise InputError(
            f"log_probs, old_log_probs, mask and advantages are {shapes!r}: the first three must be the same "
            "[B, T], advantages [B] or [B, T]."
        )
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ConfigurationError(
            f"clip_low={clip_low!r}, clip_high={clip_high!r}: the ratio is kept within [1 - low, 1 + high], "
            "so low is in [0, 1] and high at least 0."
        )
