"""`train gate`, `evaluate gate` and `calibrate`, one after the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from metis_agent.cli.calibrate import calibrate_command
from metis_agent.cli.evaluate import evaluate_app
from metis_agent.cli.train import train_app
from metis_agent.errors import ConfigurationError, InputError, MetisError
from metis_agent.gates.policy import PolicyGate

app = typer.Typer()
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")
app.command("calibrate")(calibrate_command)
TOOL = ["--direct", "direct", "--tool", "text_search=search"]


def write(path: Path, n: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    lines = []
    for row in range(n):
        hard = bool(rng.random() < 0.5)
        number = 1000 * seed + row
        lines.append(
            json.dumps(
                {
                    "question": f"Who won the {number} cup?" if hard else f"Say hello to {number}",
                    "direct_correct": int(rng.random() < (0.05 if hard else 0.95)),
                    "search_correct": int(rng.random() < 0.9),
                }
            )
        )
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_train_evaluate_calibrate(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", 300, 0), write(tmp_path / "test.jsonl", 800, 1)
    gate, figures = str(tmp_path / "gate"), tmp_path / "figures.json"
    run("train", "gate", "--outcomes", train, *TOOL, "--out", gate)
    run("evaluate", "gate", gate, "--outcomes", test, *TOOL, "--json", str(figures))
    found = json.loads(figures.read_text())
    assert {"auc", "ece", "frontier", "at_threshold", "baselines"} <= set(found)
    assert found["auc"] > 0.9
    assert found["frontier"][0].keys() == {"tool_rate", "accuracy"}
    assert {"never", "always", "oracle", "TF-IDF + logistic regression"} <= set(found["baselines"])
    run("calibrate", gate, "--outcomes", test, *TOOL, "--calls", "0.6")
    assert "calls at most 0.6" in PolicyGate(gate).artefact.description["threshold"]["chosen"]
    with pytest.raises(InputError, match="were trained on"):
        run("evaluate", "gate", gate, "--outcomes", train, *TOOL)
    with pytest.raises(ConfigurationError, match="exactly one"):
        run("calibrate", gate, "--outcomes", test, *TOOL)
    with pytest.raises(ConfigurationError, match="NAME=BRANCH"):
        run("train", "gate", "--outcomes", train, "--tool", "search", "--out", gate)
    with pytest.raises(ConfigurationError, match="branch 'wiki'"):
        run("train", "gate", "--outcomes", train, "--tool", "wiki=wiki", "--out", gate)
