"""Files that other commands wrote, and files that are something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metis_agent.errors import CheckpointError, InputError
from metis_agent.evaluation.gates import Scored, calibration_bins, evaluate_gate
from metis_agent.hdpo.export import write_artefact
from metis_agent.hdpo.gate_trainer import train_gate
from metis_agent.report.facts import read_evaluation, read_gate, read_history
from metis_agent.rollouts.outcomes import OutcomeTable


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def outcomes(n: int = 120) -> OutcomeTable:
    rng = np.random.default_rng(0)
    hard = rng.random(n) < 0.5
    return OutcomeTable(
        questions=tuple(f"Who won the {row} cup?" if hard[row] else f"Say hello to {row}" for row in range(n)),
        actions=("direct", "search"),
        correct=np.stack([np.where(hard, rng.random(n) < 0.1, rng.random(n) < 0.9), rng.random(n) < 0.9], 1).astype(
            float
        ),
        cost=np.tile([0.0, 1.0], (n, 1)),
        seconds=np.zeros((n, 2)),
    )


def test_a_gate_and_its_evaluation(tmp_path: Path) -> None:
    table = outcomes()
    trained = train_gate(table)
    scored = Scored(direct_right=trained.accuracy[:, 0], probabilities=trained.probabilities)
    figures = evaluate_gate(scored, table, 0.5, resamples=50)
    write_artefact(trained, tmp_path / "gate", table=table, metrics=figures)
    gate = read_gate(tmp_path / "gate")
    assert (gate.name, gate.kind, gate.threshold) == ("gate", "features", 0.5)
    assert gate.figures is not None
    again = read_evaluation(write(tmp_path / "figures.json", figures))
    assert again == gate.figures
    assert again.at_threshold.tool_rate == pytest.approx(figures["at_threshold"]["tool_rate"])
    assert again.at_threshold.share("redundant") == pytest.approx(figures["at_threshold"]["redundant"])
    assert sum(one.questions for one in again.calibration) == len(table)


def test_calibration_bins_are_those_worked_out_by_hand() -> None:
    # Bins of .1: .05 and .07 (one right), .95 (right), 1.0 goes with the last one (wrong).
    found = calibration_bins(np.array([0.05, 0.07, 0.95, 1.0]), np.array([1.0, 0.0, 1.0, 0.0]))
    assert found == [
        {"predicted": pytest.approx(0.06), "observed": 0.5, "questions": 2},
        {"predicted": pytest.approx(0.975), "observed": 0.5, "questions": 2},
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no evaluation"),
        ("[1, 2", "no JSON"),
        ("[]", "holds no evaluation"),
        ({"auc": 0.9}, "questions: Field required"),
        ({"questions": 1, "frontier": [{"tool_rate": 2, "accuracy": 0}], "at_threshold": {}}, "frontier.0.tool_rate"),
    ],
)
def test_what_is_no_evaluation_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_evaluation(write(tmp_path / "x.json", content))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_evaluation(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match="no gate"):
        read_gate(tmp_path)


STEP = {"step": 4, "hdpo/accuracy": 0.5, "hdpo/tool_rate": 1, "loss": -0.1, "note": "text", "hdpo/rho": None}


@pytest.mark.parametrize(
    "content",
    [
        [STEP],
        {"history": [STEP], "cold_start": {}},
        {"log_history": [STEP]},
        json.dumps(STEP) + "\n" + json.dumps(STEP),
    ],
)
def test_a_history_in_each_of_its_forms(content: Any, tmp_path: Path) -> None:
    first = read_history(write(tmp_path / "x.json", content))[0]
    assert first == {"step": 4.0, "accuracy": 0.5, "tool_rate": 1.0, "loss": -0.1}


def test_steps_are_counted_where_they_have_no_number(tmp_path: Path) -> None:
    found = read_history(write(tmp_path / "x.json", [{"rho": 0.1}, {"rho": float("nan"), "accuracy": 1}]))
    assert found == [{"step": 1.0, "rho": 0.1}, {"step": 2.0, "accuracy": 1.0}]


@pytest.mark.parametrize(
    ("content", "said"),
    [({"steps": 3}, "no list of steps"), ([{"loss": 1.0}], "none of"), ([], "none of"), ("nonsense", "no JSON")],
)
def test_what_is_no_history_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_history(write(tmp_path / "x.json", content))
