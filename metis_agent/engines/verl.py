"""HDPO for verl: a reward function, and the advantage estimator `algorithm.adv_estimator=hdpo`.

Beside `hdpo.policy_trainer`, for runs that verl drives: its rollouts and loss, our `rewards` and `advantages`. verl
imports this module by itself (an entry point of the group `verl.plugins`), and as the reward function by
`reward.custom_reward_function.path=pkg://metis_agent.engines.verl`. Read from verl 0.9.1.

verl hands an estimator one number for each rollout, so the reward function packs what HDPO needs into one (`pack`). It
can still be read: `r_acc - 0.001 T`, so 0.997 is a right and well formed answer after three calls, and the mean over a
batch is the accuracy reward but for a few thousandths. A rollout that says nothing of the model is -1.

The estimator unpacks it, does what `hdpo.advantages` does, and returns w_acc A_acc + w_tool A_tool: verl clips the sum
once. That is HDPO's gradient as long as the ratios are 1 (one update for each batch of rollouts); after that it differs
where the channels disagree on the sign and a clip takes hold.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metis_agent.errors import ConfigurationError, InfrastructureError, InputError
from metis_agent.hdpo.advantages import Objective, advantages
from metis_agent.hdpo.rewards import Scores
from metis_agent.judging.verifiers import VERIFIERS, Verifier, verify
from metis_agent.models.wire import parse_reply
from metis_agent.types import Question

__all__ = ["EXCLUDED", "MOST_CALLS", "compute_score", "hdpo_advantages", "pack", "register", "unpack"]

EXCLUDED = -1.0
"""The packed reward of a rollout that is left out of its group."""
MOST_CALLS = 99
"""More calls than this count as this many."""

_UNIT = 1000
# r_acc of (r_ans, r_fmt) in thousandths, ascending.
_LEVELS = {0: (0, 0), 100: (0, 1), 900: (1, 0), 1000: (1, 1)}


def pack(r_ans: bool, r_fmt: bool, calls: int) -> float:
    """`0.9 r_ans + 0.1 r_fmt - 0.001 T`: one number that `unpack` takes apart, also after a trip through float32."""
    level = 900 * bool(r_ans) + 100 * bool(r_fmt)
    return (level - min(max(int(calls), 0), MOST_CALLS)) / _UNIT


def unpack(packed: NDArray[np.floating[Any]]) -> Scores:
    """The scores behind packed rewards.

    Args:
        packed: [P, G].

    Raises:
        InputError: a value is none of ours: another reward function, or something that was added to the reward.
    """
    excluded = np.isclose(packed, EXCLUDED, atol=1e-4)
    # Half a unit is no reward of ours: what is not finite is found with the rest.
    units = np.where(np.isfinite(packed), np.where(excluded, 0.0, packed) * _UNIT, 0.5)
    whole = np.rint(units).astype(np.int64)
    levels = np.array(list(_LEVELS))
    place = np.searchsorted(levels, whole).clip(max=len(levels) - 1)
    calls = levels[place] - whole
    wrong = (np.abs(units - whole) > 0.1) | (calls < 0) | (calls > MOST_CALLS)
    if bool(wrong.any()):
        raise InputError(
            f"Rewards {packed[wrong][:3].tolist()!r} are not those of metis_agent.engines.verl. Set "
            "reward.custom_reward_function.path=pkg://metis_agent.engines.verl, and add nothing to the reward: "
            "algorithm.use_kl_in_reward=False, no overlong penalty, a reward manager such as 'naive'."
        )
    r_ans, r_fmt = (np.array([_LEVELS[level][part] for level in _LEVELS], dtype=np.float64)[place] for part in (0, 1))
    return Scores(
        r_ans=np.where(excluded, np.nan, r_ans),
        r_fmt=np.where(excluded, np.nan, r_fmt),
        T=calls,
        cost=calls.astype(np.float64),
        excluded=excluded,
    )


# What Qwen's and most other templates put before a reply, once special tokens are left out.
_TURN = "\nassistant\n"


def hdpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | NDArray[Any],
    config: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The estimator, called by verl's `compute_advantage` with keywords.

    Args:
        token_level_rewards: [B, T], summing to a packed reward in each row.
        response_mask: [B, T], 1 where the model wrote the token.
        index: [B], which question each row is a rollout of; groups may differ in size.
        config: verl's `algorithm`; its mapping `hdpo`, if there is one, holds fields of `hdpo.advantages.Objective`,
            such as `+algorithm.hdpo.w_tool=0.1`.

    Returns:
        The advantages twice, [B, T]: verl wants returns as well.

    Raises:
        ConfigurationError: `hdpo` holds what is no field, or the KL term goes into the reward.
        InputError: the rewards are not ours.
    """
    objective = _objective(config)
    packed = token_level_rewards.detach().sum(-1).double().cpu().numpy()
    # verl fills batches up with copies of a row that have no token of the model's own.
    packed[(response_mask.sum(-1) == 0).cpu().numpy()] = EXCLUDED
    rows = _rows(index)
    # Groups of one width; what is filled up counts as left out.
    table = np.full((len(rows), max(map(len, rows.values()), default=0)), EXCLUDED)
    for group, members in zip(table, rows.values(), strict=True):
        group[: len(members)] = packed[members]
    channels = advantages(objective, unpack(table))
    w_tool = objective.w_tool if objective.name == "hdpo" else 0.0
    combined = objective.w_acc * channels.acc + w_tool * channels.tool
    flat = torch.zeros(len(packed), dtype=torch.float32)
    for group, members in zip(combined, rows.values(), strict=True):
        flat[members] = group[: len(members)]
    spread = flat.to(token_level_rewards.device)[:, None] * response_mask
    return spread, spread


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    verifier: str = "exact",
    judge: str | None = None,
    turn: str = _TURN,
    **_: Any,
) -> dict[str, float]:
    """The reward function, called by verl for each rollout.

    Only the model's last message is judged, and of that what stands in `<answer>`, if anything does.

    Args:
        data_source: Not used.
        solution_str: The decoded response, observations included.
        ground_truth: The reference; of several any will do.
        extra_info: What verl knows of the rollout. Read are `tool_rewards` and `num_turns` (its agent loops leave them)
            or `tool_calls` for T, `excluded` (an agent loop's word that a tool server failed), and the row's own
            `question` and `verifier`.
        verifier: Of rows that name none: "exact", "numeric", "choice", "math" or "judge".
        judge: Chat model, by its `init_chat_model` name, for "judge".
        turn: What stands before each of the model's messages.

    Returns:
        `score` (packed), and for the metrics `acc`, `format`, `tool_calls`, `excluded`. A rollout that could not be
        judged has `score` -1, `excluded` 1 and an `acc` that is no number: it is not wrong.

    Raises:
        ConfigurationError: there is no such verifier, or "judge" has no judge.
    """
    info = dict(extra_info or {})
    final = solution_str.rpartition(turn)[2]
    reply = parse_reply(final)
    named = str(info.get("verifier") or verifier)
    references = list(ground_truth) if isinstance(ground_truth, list | tuple | np.ndarray) else [ground_truth]
    calls = _calls(info)
    question = str(info.get("question") or "")
    try:
        right = None if info.get("excluded") else _judged(references, question, reply.content, named, judge)
    except InfrastructureError:
        right = None
    if right is None:
        nothing = float("nan")
        return {"score": EXCLUDED, "acc": nothing, "format": nothing, "tool_calls": calls, "excluded": 1.0}
    broken = reply.tool_calls or reply.invalid_tool_calls or not reply.content
    score = pack(right, not broken, calls)
    return {"score": score, "acc": float(right), "format": float(not broken), "tool_calls": calls, "excluded": 0.0}


def register(name: str = "hdpo") -> None:
    """Register the estimator with verl; importing this module does so where verl is installed.

    Raises:
        ImportError: verl can't be imported.
    """
    importlib.import_module("verl.trainer.ppo.core_algos").register_adv_est(name)(hdpo_advantages)


def _objective(config: Any) -> Objective:
    if config is not None and config.get("use_kl_in_reward", False):
        raise ConfigurationError(
            "algorithm.use_kl_in_reward is True: a KL term in the reward can't be told from the reward. Use "
            "actor_rollout_ref.actor.use_kl_loss=True, or none, as the paper does."
        )
    fields = dict((config.get("hdpo", None) if config is not None else None) or {})
    try:
        objective = Objective(**fields)
    except TypeError as error:
        raise ConfigurationError(
            f"algorithm.hdpo is {fields!r}: {error}. Its keys are fields of metis_agent.hdpo.advantages.Objective."
        ) from error
    if objective.name == "contrast":
        raise ConfigurationError(
            "algorithm.hdpo.name='contrast': its loss for decisions is none that an advantage estimator could add. "
            "Train with HDPOTrainer, or choose 'hdpo'."
        )
    return objective


def _rows(index: Sequence[Any] | NDArray[Any]) -> dict[Any, list[int]]:
    """The rows of each question, in their order."""
    rows: dict[Any, list[int]] = {}
    for row, key in enumerate(index.tolist() if hasattr(index, "tolist") else index):
        rows.setdefault(key, []).append(row)
    return rows


def _calls(info: Mapping[str, Any]) -> int:
    """T. verl's tool loop leaves a reward for each call, and counts the turns of both sides and one more."""
    if info.get("tool_calls") is not None:
        return int(info["tool_calls"])
    rewards, turns = info.get("tool_rewards"), info.get("num_turns")
    return max(len(rewards) if rewards is not None else 0, (int(turns) - 2) // 2 if turns else 0, 0)


def _judged(references: Sequence[Any], question: str, answer: str, verifier: str, judge: str | None) -> bool | None:
    """Right by any reference; `None` where none of them can say."""
    verifiers = _verifiers(judge)
    verdicts = [
        verify(
            Question(id="verl", text=question, answer=str(reference), verifier=verifier),
            answer,
            verifiers=verifiers,
        )
        for reference in references
        if reference is not None
    ]
    return True if True in verdicts else False if False in verdicts else None


@lru_cache(maxsize=8)
def _verifiers(judge: str | None) -> Mapping[str, Verifier]:
    if judge is None:
        return VERIFIERS
    from metis_agent.judging.judge import AnswerJudge

    return {**VERIFIERS, "judge": AnswerJudge(judge)}


# A folder of that name on the path, which is a module without an origin, is not verl.
if (_found := importlib.util.find_spec("verl")) is not None and _found.origin is not None:
    register()
