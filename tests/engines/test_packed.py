from itertools import product

import numpy as np
import pytest

from metis_agent.engines.verl import EXCLUDED, MOST_CALLS, pack, unpack
from metis_agent.errors import InputError


def test_it_can_be_read() -> None:
    assert pack(True, True, 0) == 1.0
    assert pack(True, True, 3) == 0.997
    assert pack(True, False, 1) == 0.899
    assert pack(False, True, 2) == 0.098
    assert pack(False, False, 0) == 0.0


def test_everything_comes_back_through_float32() -> None:
    cases = list(product((False, True), (False, True), range(MOST_CALLS + 1)))
    packed = np.array([[pack(*case) for case in cases]], dtype=np.float32)
    assert len(set(packed[0].tolist())) == len(cases)
    scores = unpack(packed)
    found = zip(scores.r_ans[0], scores.r_fmt[0], scores.T[0], strict=True)
    assert [(bool(right), bool(formed), int(calls)) for right, formed, calls in found] == cases
    assert not scores.excluded.any()


def test_more_calls_than_fit_count_as_the_most() -> None:
    assert pack(True, True, 10_000) == pack(True, True, MOST_CALLS)
    assert unpack(np.array([[pack(False, True, 10_000)]])).T[0, 0] == MOST_CALLS


def test_an_excluded_rollout_has_no_rewards() -> None:
    scores = unpack(np.array([[EXCLUDED, 1.0]], dtype=np.float32))
    assert scores.excluded.tolist() == [[True, False]]
    assert np.isnan(scores.r_acc[0, 0])
    assert np.isnan(scores.r_tool[0, 0])


@pytest.mark.parametrize("foreign", [0.5, 1.1, -0.2, 0.89951, 1e9, float("nan"), float("inf")])
def test_a_reward_that_is_not_ours_is_refused(foreign: float) -> None:
    with pytest.raises(InputError, match=r"pkg://metis_agent\.engines\.verl"):
        unpack(np.array([[1.0, foreign]]))
