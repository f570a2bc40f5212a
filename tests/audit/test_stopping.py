"""The stopping rule of the frontier, with its heads known: it loses at most beta a run against always going on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_agent.audit import stopping
from metis_agent.audit.accounting import AuditedCall, AuditedTurn
from metis_agent.audit.frontier import best, caps, oracle, replayable
from metis_agent.audit.stopping import BETAS, StateReading, cross_fitted

READ = AuditedCall(tool="look")


class Known(stopping._Inputs):
    """Rows that say which run and state they are of, so that heads can be looked up."""

    def __init__(self, readings):
        self.x = np.arange(sum(map(len, readings)), dtype=np.float64).reshape(-1, 1)
        self.begins = np.concatenate([[0], np.cumsum([len(of_run) for of_run in readings])])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("10", min_size=2, max_size=7), min_size=1, max_size=12), st.sampled_from(BETAS))
def test_with_the_heads_known_a_run_loses_at_most_beta(runs, beta):
    # Known heads: each state's own verdict, and what came of going on, which is what the fit is given.
    found = replayable([
        AuditedTurn(id=str(n), rounds=((READ,),) * (len(said) - 1), verdicts=tuple(one == "1" for one in said))
        for n, said in enumerate(runs)
    ])  # fmt: skip
    inputs = Known([[None] * run.rounds for run in found])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "_fit", lambda x, y, train, held, binary=True: (y, y))
        rows = np.arange(inputs.states)
        stop = stopping._decide(inputs, found, range(len(found)), rows, beta)
    begins = inputs.begins
    taus = [
        next((k for k in range(run.rounds) if stop[begins[n] + k]), run.rounds) for n, run in enumerate(found)
    ]  # fmt: skip
    lost = np.mean([float(run.right[-1]) - float(run.right[tau]) for run, tau in zip(found, taus, strict=True)])
    assert lost <= beta + 1e-12
    if beta == 0:
        # Going on is stopped wherever it gains nothing, so no call is made in vain of a run that ends as it is.
        assert all(tau == 0 or not run.right[:tau].all() for run, tau in zip(found, taus, strict=True))


def test_a_gate_that_can_tell_the_runs_apart_finds_what_the_oracle_does():
    turns, readings = [], []
    for n in range(60):
        known = n % 2 == 0  # the first words say whether the calls are needed
        verdicts = (True, True, True) if known else (False, False, True)
        turns.append(AuditedTurn(id=str(n), rounds=((READ,), (READ,)), verdicts=verdicts))
        word = "capital" if known else "order"
        readings.append([StateReading(text=f"{word} word{n % 7}", numbers=(float(k),)) for k in range(2)])
    runs = replayable(turns)
    points, full = cross_fitted(runs, readings), caps(runs)[-1]
    assert [point.setting for point in points] == list(BETAS)
    assert points[0].loss_to(full) == 0
    # Where the setting loses nothing, it saves all that could be saved.
    assert best(points, full, tolerance=0.0).calls.value == pytest.approx(oracle(runs).calls.value)
    # Economy grows with beta.
    calls = [point.calls.value for point in points]
    assert calls == sorted(calls, reverse=True)


def test_too_few_runs_teach_nothing():
    runs = replayable([AuditedTurn(id=str(n), rounds=((READ,),), verdicts=(True, True)) for n in range(5)])
    assert cross_fitted(runs, [[StateReading(text="x", numbers=(0.0,))]] * 5) == []
