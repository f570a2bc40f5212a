"""The decision contrast: what a call is worth, as a plain difference of branch means.

A rollout is a decision, to answer (D) or to call (T), and the content that is written after it. With r its correctness,
e its r_tool = r / (1 + cost), w the price and l the log-odds of a call where the decision is made,

    J       = r + w e
    Delta   = mean_T J - mean_D J  =  (r_T - r_D) + w (e_T - e_D)            what calling is worth here
    L_dec   = mean_x |Delta| relu(m - sign(Delta) l)                         pulls until the odds are e^m, then lets go
    A_i     = (C_i - mean of C in i's own branch) / (std_G C + eps),         C = r_acc + w r_tool
    L       = L_clip(v A)  over the content  +  w_dec L_dec

with v_b = pi_b / (f_b + f_free pi_b), which undoes the forcing. Delta is never divided by a deviation: it is an
unbiased estimate, so the decision settles on direct only where r_T - r_D <= w (e_D - e_T) <= w. That is the rule of a
gate, for each decision of a whole model (docs/accuracy-safe.md). A is about what is written down a branch, and never
rewards or blames the choice of it.

At later steps of a run the same holds wherever rollouts of a group stand at one prompt, token for token, and some call
there and others answer, by themselves or forced; there e counts what is spent from there on, so that one call too many
weighs the same at every step. Where none do, a later call is content, and C carries its price. What a run came to says
nothing of the decisions before one that was forced.

Stands beside `advantages` and `loss`: tensors are [P, G], P questions with G rollouts each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metis_agent.hdpo.exploration import begins, forced_opening
from metis_agent.types import Trajectory

__all__ = ["Opening", "by_token", "content_advantages", "contrasts", "decision_loss", "openings"]


def contrasts(J: Tensor, called: Tensor, included: Tensor) -> Tensor:
    """Delta = mean_T J - mean_D J of each question, [P]; 0 where a branch has no rollout.

    Args:
        J: [P, G], what a rollout was worth: r + w e.
        called: [P, G] bool, whether it decided to call.
        included: [P, G] bool.
    """
    T, D = included & called, included & ~called
    Delta = _mean(J, T) - _mean(J, D)
    return torch.where(T.any(1) & D.any(1), Delta.squeeze(1), 0.0)


def content_advantages(
    C: Tensor, called: Tensor, included: Tensor, apart: Tensor, *, eps: float = 1e-4, ddof: int = 1
) -> Tensor:
    """A_i = (C_i - mean of C in i's own branch) / (std_G C + eps), [P, G]; 0 where not included.

    Args:
        C: [P, G], r_acc + w r_tool.
        called: [P, G] bool.
        included: [P, G] bool.
        apart: [P] bool, whether decision and content can be told apart on a question. Where they can't (the model
            thinks before it decides), the mean is the whole group's: A then rewards the choice as well, by the same C.
        eps: Added to the deviation.
        ddof: 1 for the sample deviation.
    """
    own_branch = torch.where(called, _mean(C, included & called), _mean(C, included & ~called))
    of_group = _mean(C, included)
    centred = torch.where(included, C - of_group, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (included.sum(1, keepdim=True) - ddof).clamp(min=1)).sqrt()
    A = (C - torch.where(apart[:, None], own_branch, of_group)) / (std + eps)
    # Equal values differ by their rounding, which is no signal.
    return torch.where(included & (A.abs() > 1e-6), A, 0.0)


def decision_loss(log_p: Tensor, contrast: Tensor, *, margin: float) -> Tensor:
    """|Delta| relu(m - sign(Delta) l) of each decision, l = log p - log(1 - p).

    A hinge on the log-odds: its pull does not depend on where the policy stands, so a branch that is better but rare is
    found at once (a policy gradient has pi_D pi_T in front), and it ends once the decision is made, so that nothing
    saturates at the content's expense (a cross entropy never ends).

    Args:
        log_p: Log-probability of the call's opening, below 0.
        contrast: Delta, of the same shape.
        margin: m.
    """
    log_p = log_p.clamp(max=-1e-7)  # float32 can't tell a likelier call from a certain one
    log_odds = log_p - torch.log(-torch.expm1(log_p))
    return contrast.abs() * torch.relu(margin - contrast.sign() * log_odds)


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Where a rollout decided to call: the first tokens of one of its model calls."""

    tokens: int
    """How many they are."""
    contrast: float
    """Delta of the decision, at a later step times the share of the group that stood there; 0 where another rollout
    stands for this one: all that called in one decision have the same log-odds there, so one row is enough."""


def openings(
    trajectories: Sequence[Trajectory],
    r: NDArray[np.float64],
    cost: NDArray[np.float64],
    included: NDArray[np.bool_],
    Delta: Sequence[float],
    apart: NDArray[np.bool_],
    *,
    price: float,
    forced_at: Sequence[int] = (),
) -> dict[tuple[int, int], Opening]:
    """Where rollouts decided to call, and what each decision is worth.

    Args:
        trajectories: P G rollouts, group by group.
        r: [P, G], whether each was right.
        cost: [P, G], what each spent on calls.
        included: [P, G].
        Delta: [P], the contrasts of the first decisions.
        apart: [P], where decision and content can be told apart.
        price: w.
        forced_at: Of each of the G rollouts, the decision that was forced, counted from 0; -1 for a free one. By
            default none later than the first.

    Returns:
        By (rollout, model call), both counted from 0. A decision at which no rollout called, or at a later step one at
        which none answered, is not there.
    """
    size = r.shape[1]
    found: dict[tuple[int, int], Opening] = {}
    for group in np.flatnonzero(apart).tolist():
        first = group * size
        runs = trajectories[first : first + size]
        tokens = forced_opening(runs)
        at = forced_at or [-1] * size
        for places, contrast in _decisions(
            runs, r[group], cost[group], included[group], Delta[group], tokens, at, price
        ):
            for rollout, call in places:
                stands = (rollout, call) == places[0]
                found[first + rollout, call] = Opening(tokens=len(tokens), contrast=contrast if stands else 0.0)
    return found


def _decisions(
    runs: Sequence[Trajectory],
    r: NDArray[np.float64],
    cost: NDArray[np.float64],
    included: NDArray[np.bool_],
    Delta: float,
    tokens: Sequence[int],
    forced_at: Sequence[int],
    price: float,
) -> Iterator[tuple[list[tuple[int, int]], float]]:
    """Each decision of a group: who called in it, by (rollout, model call), and its contrast."""
    at: dict[Any, list[tuple[int, int]]] = {}
    for rollout in np.flatnonzero(included).tolist():
        for step, call in enumerate(runs[rollout].calls):
            # Later on the rollouts at one prompt had the same two branches before them: no budget had run out.
            ours = step == forced_at[rollout]
            if step == 0 or ours or (call.sampling.get("tool_choice") != "none" and not call.forced):
                at.setdefault(step and call.prompt_ids, []).append((rollout, step))
    for prompt, places in at.items():
        calls = [(rollout, step) for rollout, step in places if begins(runs[rollout].calls[step], tokens)]
        answers = [(i, k) for i, k in places if not runs[i].calls[k].tool_calls and (i, k) not in calls]
        if calls and prompt == 0:
            yield calls, Delta
        elif calls and (spent := [cost[i] for i, k in answers if k == len(runs[i].calls) - 1]):
            # Those that answer here, and are not asked again, spend no more.
            J = r * (1 + price / (1 + np.maximum(0.0, cost - min(spent))))
            came_to = [
                [J[i] for i, k in branch if not k < forced_at[i] < len(runs[i].calls)] for branch in (calls, answers)
            ]
            gain = np.mean(came_to[0]) - np.mean(came_to[1]) if all(came_to) else 0.0
            yield calls, float(gain) * (len(calls) + len(answers)) / len(runs)


def by_token(
    places: Mapping[tuple[int, int], Opening], rows: Sequence[tuple[int, Sequence[tuple[int, int]]]], width: int
) -> tuple[Tensor, Tensor]:
    """The decisions in R rows of tokens.

    Args:
        places: By (rollout, model call).
        rows: Of each row the rollout, and (model call, its first token) of the replies in it.
        width: T, tokens of a row.

    Returns:
        [R, T]: 0 at content, s + 1 at a token of the opening of the row's decision s. [R, S]: their contrasts, 0 where
        a row has fewer.
    """
    in_row = [
        [(start, places[rollout, call]) for call, start in starts if (rollout, call) in places]
        for rollout, starts in rows
    ]
    which = torch.zeros(len(rows), width, dtype=torch.long)
    contrast = torch.zeros(len(rows), max([1, *map(len, in_row)]))
    for row, decisions in enumerate(in_row):
        for s, (start, opening) in enumerate(decisions):
            which[row, start : start + opening.tokens] = s + 1
            contrast[row, s] = opening.contrast
    return which, contrast


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """[P, 1]: the mean of a row's values among some; 0 where there are none."""
    return torch.where(among, values, 0.0).sum(1, keepdim=True) / among.sum(1, keepdim=True).clamp(min=1)
