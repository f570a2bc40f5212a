"""Two published objectives to compare with, from their papers' formulas: OTC-GRPO and EAPO.

Both are GRPO on the correctness reward times a factor for the calls. With T the executed calls of a rollout and n the
fewest among its group's right ones (0 where none is right),

    OTC   r = r_ans k,  k = 1 if T = n = 0, cos(T pi / (2T + c)) if n = 0, else sin(f pi / (2n)) with f = 2nT / (T + n)
    EAPO  r = (d + (1 - d) e) R,  d = 1 - mean r_ans,  e = exp(-beta (T - n)), 1 if T = 0,  R = r_ans, -1 if malformed

Sources: arXiv:2504.14870v2 (alpha 1, c the limit of calls), arXiv:2606.02132v2 (beta 1). Importing this module makes
them known as the objectives "otc" and "eapo". OTC has no reward for the form: it gets the tenth that others have here.
Left out: OTC's memory of n over epochs, as no question comes twice; EAPO's weights of tokens by confidence. EAPO's
tool-free rollouts, which its prompt asks for, are here those that stratified groups force, 4 of 16 where it has 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_agent.hdpo.advantages import Objective, group_advantage, register_objective
from metis_agent.hdpo.rewards import Scores

__all__ = ["eapo_rewards", "otc_rewards"]

CALLS = 2
"""c: calls that a run of the almanac may make."""


def otc_rewards(scores: Scores) -> Tensor:
    """[P, G]: right with as few calls as the best of the group."""
    T, n = _calls(scores)
    few = torch.where(T == 0, 1.0, torch.cos(T * torch.pi / (2 * T + CALLS)))
    some = torch.sin(T / (T + n).clamp(min=1) * torch.pi)
    right = torch.as_tensor(scores.correct).double() * torch.where(n == 0, few, some)
    return 0.9 * right + 0.1 * torch.as_tensor(scores.r_fmt)


def eapo_rewards(scores: Scores) -> Tensor:
    """[P, G]: calls cost the more, the more of the group is right."""
    T, n = _calls(scores)
    right, counts = torch.as_tensor(scores.correct).double(), torch.as_tensor(~scores.excluded)
    solved = right.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    e = torch.where(T == 0, 1.0, torch.exp(n - T))
    return (1 - solved + solved * e) * torch.where(torch.as_tensor(scores.r_fmt) == 1, right, -1.0)


def _calls(scores: Scores) -> tuple[Tensor, Tensor]:
    T = torch.as_tensor(scores.T).double()
    fewest = torch.where(torch.as_tensor(scores.correct), T, torch.inf).amin(1, keepdim=True)
    return T, torch.where(fewest.isinf(), 0.0, fewest)


def _otc(objective: Objective, scores: Scores) -> Tensor:
    return _grpo(otc_rewards(scores), objective, scores)


def _eapo(objective: Objective, scores: Scores) -> Tensor:
    return _grpo(eapo_rewards(scores), objective, scores)


def _grpo(rewards: Tensor, objective: Objective, scores: Scores) -> Tensor:
    return group_advantage(rewards, torch.as_tensor(~scores.excluded), eps=objective.eps, ddof=objective.ddof)


register_objective("otc", _otc)
register_objective("eapo", _eapo)
