"""`metis train gate --policy encoder` and `decision_lm` on the command line: they train, are measured and served."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import MetisError
from metis_agent.gates.policy import PolicyGate
from tests.hdpo.policies.tiny import planted, save_bert, save_qwen

# Training takes seconds, and minutes on a machine that is busy with other things.
pytestmark = pytest.mark.timeout(900)
TOOLS = ("--tool", "calculator=calculator", "--tool", "wiki=wiki")


def write(path: Path, seed: int, n: int = 48) -> str:
    table = planted(n, seed)
    rows = [
        {
            "question": question,
            **{f"{name}_correct": int(value) for name, value in zip(table.actions, right, strict=True)},
        }
        for question, right in zip(table.questions, table.correct, strict=True)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("policy", ["encoder", "decision_lm"])
def test_train_evaluate_calibrate(tmp_path: Path, policy: str) -> None:
    model = {"encoder": save_bert, "decision_lm": save_qwen}[policy](tmp_path / "model")
    train, test = write(tmp_path / "train.jsonl", 0), write(tmp_path / "test.jsonl", 1, 200)
    gate, figures = str(tmp_path / "gate"), tmp_path / "figures.json"
    run(
        "train", "gate", "--outcomes", train, *TOOLS, "--policy", policy, "--model", model, "--out", gate,
        "--folds", "2", "--epochs", "1", "--learning-rate", "0.002",
        "--describe", "wiki=looks up facts", "--device", "cpu",
    )  # fmt: skip
    assert not (tmp_path / "gate.training").exists()
    run("evaluate", "gate", gate, "--outcomes", test, *TOOLS, "--drop-seen", "--json", str(figures))
    assert 0 <= json.loads(figures.read_text())["auc"] <= 1
    run("calibrate", gate, "--outcomes", test, *TOOLS, "--drop-seen", "--accuracy-loss", "0.8")
    loaded = PolicyGate(gate)
    assert "accuracy_loss at most 0.8" in loaded.artefact.description["threshold"]["chosen"]
    assert loaded.artefact.description["tools"][1] == {"name": "wiki", "description": "looks up facts"}
    assert set(loaded.score("Find the river of q")[1]) == {"calculator", "wiki"}


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (("--policy", "encoder"), "needs --model"),
        (("--policy", "decision_lm"), "Qwen/Qwen3-0.6B"),
        (("--policy", "encoder", "--model", "./nowhere"), "no such folder"),
        (("--policy", "encoder", "--model", "a/b", "--lora"), "adapters are for"),
        (("--model", "a/b"), "add --policy encoder"),
    ],
)
def test_options_that_do_not_go_together_say_what_to_do(tmp_path: Path, options: tuple[str, ...], advice: str) -> None:
    train = write(tmp_path / "train.jsonl", 0)
    with pytest.raises(MetisError, match=advice):
        run("train", "gate", "--outcomes", train, *TOOLS, "--out", str(tmp_path / "gate"), *options)
