"""From rewards to advantages: HDPO's two channels, and the objectives that it is compared with.

Between `rewards` and `loss`. Tensors are [P, G]: P questions, G rollouts of each; every mean and deviation
runs over the rollouts of a question that are not excluded. With Q = {i : correct_i},

    A_acc_i  = (r_acc_i - mean_G r_acc) / (std_G r_acc + eps)
    A_tool_i = (r_tool_i - mean_Q r_tool) / (std_Q r_tool + eps)   for i in Q with |Q| >= 2, else 0

Source: arXiv:2604.08545. eps = 1e-4 and the sample deviation (ddof = 1) are those of TRL's GRPO trainer, so
that w_tool = 0 is TRL's GRPO. Where the paper's code differs: there the rounding of 1/3, 1/5 or 1/6 gives
rollouts with equal tool counts advantages of up to 0.056, taken for a signal; here they are exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.contrast import content_advantages, contrasts
from metis_agent.hdpo.exploration import BranchCounts, count_branches
from metis_agent.hdpo.rewards import Scores

__all__ = [
    "Channels",
    "Objective",
    "advantages",
    "branch_weight",
    "coupled_advantages",
    "gdpo_advantages",
    "group_advantage",
    "hdpo_advantages",
    "register_objective",
]

TIE = 1e-6
"""Nearer than this, relative to 1 + the larger, values are equal: wider than float32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which advantages to train on.

    - "hdpo": two channels, A_acc and A_tool, that meet only in the loss.
    - "contrast": decision and content apart: a hinge on the decision's log-odds, weighed by what calling is worth,
      and an advantage for what is written within each branch (see `contrast`).
    - "grpo": A_acc alone.
    - "coupled": GRPO on the one scalar r_acc + alpha r_tool.
    - "gdpo": each reward normalised over the whole group, right or wrong, then summed as A_acc + w_tool
      A_tool and normalised over the batch (TRL's "normalize_then_sum").
    - any name that `register_objective` was given: one of your own.

    Raises:
        ConfigurationError: A name is unknown, a weight negative or not finite, or an option another objective's.
    """

    name: str = "hdpo"
    w_acc: float = 1.0
    w_tool: float = 0.15
    """Weight of the tool channel in the loss ("hdpo"), or of its reward in the sum ("gdpo")."""
    alpha: float = 0.15
    """Weight of r_tool in the scalar reward of "coupled"."""
    price: float = 0.5
    """w of "contrast": the accuracy that a call may cost; half of it per call saved where all else is equal."""
    odds: float = 6.0
    """m of "contrast": log-odds at which a decision counts as made."""
    w_decision: float = 0.1
    """Weight of the decision's loss in "contrast". Its gradient is tens of times that of the content, which learns next
    to nothing where the two are added as they are: gradients are clipped, and scaled by their own size."""
    branch_weight: bool = False
    """Multiply A_tool by `branch_weight(...)`, so that a call is only discouraged where direct answers do."""
    margin: float = 0.1
    """Accuracy by which the direct branch may trail the tool branch and still do."""
    eps: float = 1e-4
    ddof: int = 1

    def __post_init__(self) -> None:
        if self.name not in _ADVANTAGES:
            raise ConfigurationError(
                f"name={self.name!r}: choose one of {', '.join(_ADVANTAGES)}, or add your own by register_objective."
            )
        for field in ("w_acc", "w_tool", "alpha", "price", "odds", "w_decision", "margin", "eps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"{field}={value!r}: must be finite and at least 0.")
        if self.ddof not in (0, 1):
            raise ConfigurationError(f"ddof={self.ddof!r}: 0 is the population deviation, 1 the sample's (TRL's).")
        if self.branch_weight and self.name != "hdpo":
            raise ConfigurationError(
                f"branch_weight=True with name={self.name!r}: only 'hdpo' has a channel of its own to weight."
            )


@dataclass(frozen=True, kw_only=True)
class Channels:
    """What the loss needs and what is worth logging; tensors [P, G] unless said otherwise."""

    acc: Tensor
    """A_acc, or the only advantage of an objective with one channel; 0 where excluded."""
    tool: Tensor
    """A_tool; 0 outside Q, and everywhere for an objective with one channel."""
    qualifying: Tensor
    """Bool: Q, the correct rollouts."""
    rho: Tensor
    """[P]: |Q| / G where the tool channel has a signal (|Q| >= 2 and unequal costs in Q), else 0."""
    weight: Tensor
    """[P]: what A_tool was multiplied by, 1 without the branch weight."""
    contrast: Tensor
    """[P]: Delta, what calling is worth on a question ("contrast"); 0 for the other objectives."""

    def of_groups(self, first: int, count: int) -> Channels:
        """Those of `count` questions from the `first` on: a process's own."""
        own = slice(first, first + count)
        return Channels(
            acc=self.acc[own],
            tool=self.tool[own],
            qualifying=self.qualifying[own],
            rho=self.rho[own],
            weight=self.weight[own],
            contrast=self.contrast[own],
        )


def group_advantage(reward: Tensor, included: Tensor, *, eps: float = 1e-4, ddof: int = 1) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps), each row over its included entries.

    Args:
        reward: [P, G], floating point; NaN counts as not included.
        included: [P, G] bool.
        eps: Added to the deviation.
        ddof: 0 divides the variance by n, 1 by n - 1.

    Returns:
        [P, G]: 0 outside `included`, in rows with fewer than two entries, and exactly 0 in rows of equal
        rewards.
    """
    if reward.ndim != 2 or reward.shape != included.shape:
        raise InputError(
            f"reward is {tuple(reward.shape)!r}, included {tuple(included.shape)!r}: both must be the same [P, G]."
        )
    included = included & ~reward.isnan()
    n = included.sum(1, keepdim=True)
    r = torch.where(included, reward, 0.0)
    centred = torch.where(included, r - r.sum(1, keepdim=True) / n.clamp(min=1), 0.0)
    std = (centred.square().sum(1, keepdim=True) / (n - ddof).clamp(min=1)).sqrt()
    return torch.where(included & _differ(reward, included), centred / (std + eps), 0.0)


def hdpo_advantages(
    r_acc: Tensor,
    r_tool: Tensor,
    correct: Tensor,
    excluded: Tensor,
    *,
    eps: float = 1e-4,
    ddof: int = 1,
) -> Channels:
    """A_acc over all rollouts, A_tool over the correct ones; both [P, G], as at the head of this module.

    Args:
        r_acc: [P, G], NaN where excluded.
        r_tool: [P, G].
        correct: [P, G] bool.
        excluded: [P, G] bool.
        eps: Added to the deviations.
        ddof: 1 for the sample deviation.
    """
    qualifying = correct & ~excluded
    signal = _differ(r_tool, qualifying).squeeze(1)
    rho = torch.where(signal, qualifying.to(r_acc.dtype).mean(1), 0.0)
    return Channels(
        acc=group_advantage(r_acc, ~excluded, eps=eps, ddof=ddof),
        tool=group_advantage(r_tool, qualifying, eps=eps, ddof=ddof),
        qualifying=qualifying,
        rho=rho,
        weight=torch.ones_like(rho),
        contrast=torch.zeros_like(rho),
    )


def coupled_advantages(
    r_acc: Tensor, r_tool: Tensor, excluded: Tensor, *, alpha: float, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """GRPO on the scalar r_acc + alpha r_tool, [P, G]: the baseline whose channels HDPO takes apart."""
    return group_advantage(r_acc + alpha * r_tool, ~excluded, eps=eps, ddof=ddof)


def gdpo_advantages(
    r_acc: Tensor,
    r_tool: Tensor,
    excluded: Tensor,
    *,
    w_tool: float,
    eps: float = 1e-4,
    ddof: int = 1,
) -> Tensor:
    """Reward-decoupled normalisation, [P, G]: each reward over its group, the sum over the batch.

        S = GRPO(r_acc) + w_tool GRPO(r_tool),   A = (S - mean S) / (std S + eps)

    r_tool is normalised over the whole group, wrong answers (r_tool = 0) included: the condition on
    correctness is what HDPO adds. Same as TRL's `multi_objective_aggregation="normalize_then_sum"`.
    """
    included = ~excluded
    A_acc = group_advantage(r_acc, included, eps=eps, ddof=ddof)
    A_tool = group_advantage(r_tool, included, eps=eps, ddof=ddof)
    batch = (A_acc + w_tool * A_tool).reshape(1, -1)
    return group_advantage(batch, included.reshape(1, -1), eps=eps, ddof=ddof).reshape(r_acc.shape)


def branch_weight(counts: BranchCounts, *, margin: float = 0.1, points: int = 8192) -> Tensor:
    """How sure it is that answering directly does: c = max(0, 2 Pr[p_D >= p_T - margin] - 1).

    p_D and p_T, the accuracies of the two branches on a question, have posteriors Beta(k + 1/2, n - k + 1/2)
    (Jeffreys' prior). With p = sin^2 theta their densities are sin^(2k) cos^(2(n - k)), smooth also at the
    ends, so the midpoint rule on `points` angles gives the probability to better than 1e-5, the same on every
    run.

    Args:
        counts: For P questions.
        margin: Accuracy by which the direct branch may trail.
        points: Of the quadrature.

    Returns:
        [P] float64, in [0, 1]; 0 where a branch has no rollout.
    """
    step = math.pi / 2 / points
    theta = (torch.arange(points, dtype=torch.float64) + 0.5) * step
    density_D = _angle_density(counts.direct_right, counts.direct_n, theta)
    density_T = _angle_density(counts.tool_right, counts.tool_n, theta)
    # Pr[p_D < x] at the angle of x = p_T - margin, read between the edges of the cells.
    below_D = torch.nn.functional.pad(density_D.cumsum(1), (1, 0))
    edge = (theta.sin().square() - margin).clamp(min=0).sqrt().arcsin() / step
    left = edge.floor().long().clamp(max=points - 1)
    below = torch.lerp(below_D[:, left], below_D[:, left + 1], (edge - left).expand_as(density_T))
    c = (2 * (1 - (density_T * below).sum(1)) - 1).clamp(min=0, max=1)
    both = torch.as_tensor((counts.direct_n > 0) & (counts.tool_n > 0))
    return torch.where(both, c, 0.0)


def advantages(
    objective: Objective,
    scores: Scores,
    branches: BranchCounts | None = None,
    *,
    called: NDArray[np.bool_] | None = None,
    apart: NDArray[np.bool_] | None = None,
    cut: NDArray[np.bool_] | None = None,
) -> Channels:
    """The advantages of any objective: the one function that a trainer calls.

    Args:
        objective: Which, and its constants.
        scores: Of P groups of G rollouts.
        branches: Evidence for the branch weight, where it is not to be the groups' own.
        called: [P, G], for "contrast": which rollouts decided to call; by default those that executed a call.
        apart: [P], likewise: where decision and content can be told apart; by default everywhere.
        cut: [P, G], likewise: rollouts that were forced at a later decision, so that what they came to says nothing of
            the first; by default none.

    Returns:
        Float32 channels. An objective with one channel has it in `acc` and zeros in `tool`.

    Raises:
        InputError: `branches` is for another number of questions.
    """
    r_acc, r_tool = torch.as_tensor(scores.r_acc), torch.as_tensor(scores.r_tool)
    excluded = torch.as_tensor(scores.excluded)
    eps, ddof = objective.eps, objective.ddof
    channels = hdpo_advantages(
        r_acc,
        r_tool,
        torch.as_tensor(scores.correct),
        excluded,
        eps=eps,
        ddof=ddof,
    )
    acc, tool, weight, contrast = channels.acc, channels.tool, channels.weight, channels.contrast
    if objective.name == "contrast":
        T = torch.as_tensor(scores.T > 0 if called is None else called)
        told = torch.ones(len(T), dtype=torch.bool) if apart is None else torch.as_tensor(apart)
        J = torch.as_tensor(scores.r_ans) + objective.price * r_tool
        whole = ~excluded if cut is None or not cut.size else ~excluded & ~torch.as_tensor(cut)
        contrast = torch.where(told, contrasts(J, T, whole), 0.0)
        acc = content_advantages(r_acc + objective.price * r_tool, T, ~excluded, told, eps=eps, ddof=ddof)
    elif made := _ADVANTAGES[objective.name]:
        acc = torch.where(excluded, 0.0, made(objective, scores))
    if objective.branch_weight:
        weight = branch_weight(_for(scores, branches), margin=objective.margin)
        tool = tool * weight[:, None]
    if objective.name != "hdpo":
        tool = torch.zeros_like(tool)
    return Channels(
        acc=acc.float(),
        tool=tool.float(),
        qualifying=channels.qualifying,
        rho=channels.rho.float(),
        weight=weight.float(),
        contrast=contrast.float(),
    )


def register_objective(name: str, advantage: Callable[[Objective, Scores], Tensor]) -> None:
    """Make an objective of your own known by a name: `Objective(name=...)` then trains on its advantages.

    Args:
        name: For `Objective`, and `objective` of `HDPOConfig`.
        advantage: Gives one advantage for each rollout, [P, G], of the objective's constants and P groups' scores; what
            it says of excluded rollouts is ignored. `group_advantage` makes GRPO's of a reward.

    Raises:
        ConfigurationError: The name is another's.
    """
    if _ADVANTAGES.get(name, advantage) is not advantage:
        raise ConfigurationError(f"There is an objective {name!r} already: take none of {', '.join(_ADVANTAGES)}.")
    _ADVANTAGES[name] = advantage


def _coupled(objective: Objective, scores: Scores) -> Tensor:
    rewards = (torch.as_tensor(each) for each in (scores.r_acc, scores.r_tool, scores.excluded))
    return coupled_advantages(*rewards, alpha=objective.alpha, eps=objective.eps, ddof=objective.ddof)


def _gdpo(objective: Objective, scores: Scores) -> Tensor:
    rewards = (torch.as_tensor(each) for each in (scores.r_acc, scores.r_tool, scores.excluded))
    return gdpo_advantages(*rewards, w_tool=objective.w_tool, eps=objective.eps, ddof=objective.ddof)


_ADVANTAGES: dict[str, Callable[[Objective, Scores], Tensor] | None] = {
    "hdpo": None, "contrast": None, "grpo": None, "coupled": _coupled, "gdpo": _gdpo,
}  # fmt: skip
"""What each objective trains on; None is A_acc, and what `advantages` itself makes of it."""


def _for(scores: Scores, branches: BranchCounts | None) -> BranchCounts:
    if branches is None:
        return count_branches(scores)
    if len(branches.direct_n) != len(scores.excluded):
        raise InputError(
            f"branches is for {len(branches.direct_n)!r} questions and scores for {len(scores.excluded)!r}: "
            "they need one entry for each group, in the same order."
        )
    return branches


def _differ(values: Tensor, included: Tensor) -> Tensor:
    """[P, 1] bool: rows with two or more included entries that are not all equal."""
    highest = torch.where(included, values, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(included, values, math.inf).amin(1, keepdim=True)
    largest = torch.maximum(highest.abs(), lowest.abs())
    return (included.sum(1, keepdim=True) >= 2) & (highest - lowest > TIE * (1 + largest))


def _angle_density(right: NDArray[np.float64], n: NDArray[np.float64], theta: Tensor) -> Tensor:
    """[P, points]: sin^(2k) cos^(2(n - k)) at each angle, summing to 1."""
    k, total = torch.as_tensor(right)[:, None], torch.as_tensor(n)[:, None]
    log_density = 2 * k * theta.sin().log() + 2 * (total - k) * theta.cos().log()
    return log_density.softmax(1)
