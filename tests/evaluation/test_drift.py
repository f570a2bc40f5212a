from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from metis_agent.evaluation.comparison import drift_since_calibration, reference_note
from metis_agent.evaluation.gates import Scored, columns_of
from metis_agent.gates.features import readings


def scored(n: int, seed: int, shift: float = 0.0) -> Scored:
    rng = np.random.default_rng(seed)
    direct = np.clip(rng.beta(2, 2, n) + shift, 0, 1)
    return Scored(direct_right=direct, probabilities=np.stack([1 - direct, rng.random(n)], axis=1))


@dataclass
class Artefact:
    description: dict[str, Any]
    tools: tuple[str, ...] = ("search", "python")


def calibrated(n: int, seed: int) -> Any:
    note = {"value": 0.5, "reference": reference_note(scored(n, seed), ("search", "python"))}
    return Artefact(description={"threshold": note})


def test_false_alarms_are_as_rare_as_stated() -> None:
    # 3,000 questions are kept as 1,000 ranks. At level 0.05 about 5 of 100 checks may alarm; by the binomial
    # distribution more than 13 of them would be a chance below 0.001.
    pairs = [(calibrated(3000, seed), scored(400, 10_000 + seed)) for seed in range(100)]
    found = [drift_since_calibration(artefact, today, level=0.05) for artefact, today in pairs]
    assert sum(one.drifted for one in found if one is not None) <= 13


def test_a_change_is_found_and_named() -> None:
    found = drift_since_calibration(calibrated(500, 0), scored(500, 1, shift=0.2))
    assert found is not None
    assert found.drifted
    assert found.column in ("direct answer is right", "search is worth calling")
    assert found.distance > 0.2


def test_scores_at_the_end_of_the_scale_are_no_drift() -> None:
    # A sure gate: 1 - 1e-7 and 1 - 1e-9 are the same answer.
    def sure(tiny: float) -> Scored:
        return Scored(direct_right=np.full(100, 1 - tiny), probabilities=np.full((100, 2), tiny))

    note = {"value": 0.5, "reference": reference_note(sure(1e-7), ("search", "python"))}
    found = drift_since_calibration(Artefact(description={"threshold": note}), sure(1e-9))  # type: ignore[arg-type]
    assert found is not None
    assert not found.drifted


def test_a_gate_without_calibration_says_nothing() -> None:
    artefact: Any = SimpleNamespace(description={"threshold": {"value": 0.5}}, tools=("search", "python"))
    assert drift_since_calibration(artefact, scored(50, 0)) is None


def read_questions(words: tuple[str, ...], n: int, seed: int) -> Scored:
    """What a gate reads of questions about `words`, whose scores tell nothing."""
    rng = np.random.default_rng(seed)
    rows = [readings(f"What is the {rng.choice(words)} of {rng.integers(10, 9999)}?") for _ in range(n)]
    return replace(scored(n, seed), read=columns_of(rows))


def test_a_fifth_of_foreign_questions_is_seen_by_what_is_read_where_the_scores_say_nothing() -> None:
    usual, foreign = ("square", "cube", "root"), ("inhabitants, by the latest census that there is,", "history")
    note = {"value": 0.5, "reference": reference_note(read_questions(usual, 600, 0), ("search", "python"))}
    gate: Any = Artefact(description={"threshold": note})
    seen = alarms = 0
    for seed in range(20):
        own, other = read_questions(usual, 300, 100 + seed), read_questions(foreign, 60, 200 + seed)
        mixed = {name: np.append(column[:240], other.read[name]) for name, column in own.read.items()}
        today = drift_since_calibration(gate, replace(own, read=mixed))
        seen += today is not None and today.drifted and today.column.startswith("question: ")
        usual_day = drift_since_calibration(gate, own)
        alarms += usual_day is not None and usual_day.drifted
    assert seen == 20
    assert alarms <= 1


def test_a_gate_that_kept_its_scores_alone_is_compared_by_these() -> None:
    gate = calibrated(500, 0)
    found = drift_since_calibration(gate, replace(scored(300, 1), read={"question: words": np.zeros(300)}))
    assert found is not None
    assert not found.drifted
