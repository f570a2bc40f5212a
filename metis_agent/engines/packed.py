"""All that HDPO needs to know of a rollout in one number, for engines that let only one through.

Between an engine's reward function, which packs, and its advantage estimator, which unpacks. The number can still be
read: `r_acc - 0.001 T`, so 0.997 is a right and well formed answer after three calls, and the mean over a batch is the
accuracy reward but for a few thousandths. A rollout that says nothing of the model is -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import InputError
from metis_agent.hdpo.rewards import Scores

__all__ = ["EXCLUDED", "MOST_CALLS", "pack", "unpack"]

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
