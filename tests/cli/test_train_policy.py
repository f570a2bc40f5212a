"""`metis train policy`: one file, checked with errors that teach, trained, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.cli.policy_run import _arguments, check_reporters, verify_of_run
from metis_agent.cli.train_policy import CONFIGS, read_run
from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.recording.recorder import question_of
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.questions import read_questions
from metis_agent.types import Trajectory

SMALL = [
    "training.steps=2", "training.questions_per_step=2", "training.micro_batch=8", "groups.size=4", "groups.direct=1",
    "groups.tool=1", "questions.train.arguments.count=4", "questions.validation.arguments.count=3",
    "validation.every=2", "validation.direct=1", "training.checkpoint_every=1",
]  # fmt: skip


def train(*more: str, out: Path) -> Any:
    changes = [part for change in (*SMALL, f"output={out}") for part in ("--set", change)]
    return CliRunner().invoke(app, ["train", "policy", "--config", "laptop", *changes, *more])


def test_the_laptop_run_trains_measures_and_can_be_loaded_and_is_not_run_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = train("--json", str(tmp_path / "figures.json"), out=out)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert json.loads((tmp_path / "figures.json").read_text())["steps"] == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "hdpo/rho" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for name in (
        "hdpo/acc_loss",
        "hdpo/tool_loss",
        "hdpo/tool_clip_fraction",
        "clip_ratio/region_mean",
        "hdpo/excluded",
    ):
        assert name in steps[0], name
    assert "validation/tool_rate" in lines[0]
    assert "validation/redundant_rate" in lines[0] or "validation/accuracy" in lines[0]
    assert "validation/accuracy" in steps[1]
    from metis_agent.models.local import LocalChatModel

    reply = LocalChatModel.load(out / "policy").invoke("hi")
    assert reply.text or reply.tool_calls
    # The same command once more has nothing left to do; other settings are refused.
    again = train(out=out)
    assert again.exit_code == 0, again.output
    assert "Going on" in again.output
    other = train("--set", "objective.w_tool=0.3", out=out)
    assert isinstance(other.exception, ConfigurationError)
    assert "objective.w_tool was 0.15, now 0.3" in str(other.exception)
    assert "--fresh" in str(other.exception)


@pytest.mark.parametrize("name", ["laptop", "pretrained", "qwen3-vl-8b", "qwen3-vl-8b-nodes"])
def test_the_packaged_files_are_sound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "WORLD_SIZE", {"laptop": "1", "pretrained": "1", "qwen3-vl-8b": "6", "qwen3-vl-8b-nodes": "24"}[name]
    )
    checked = CliRunner().invoke(app, ["train", "policy", "--config", name, "--check"])
    assert checked.exit_code == 0, checked.output
    assert "sound" in checked.output
    assert str(CONFIGS / f"{name}.yaml")
    shown = CliRunner().invoke(app, ["train", "policy", "--config", name, "--show"])
    assert "w_tool: 0.15" in shown.output


def test_the_papers_figures_stand_in_the_papers_file() -> None:
    run = read_run("qwen3-vl-8b")
    assert (run.groups.size, run.objective.w_acc, run.objective.w_tool) == (16, 1.0, 0.15)
    assert (run.training.learning_rate, run.training.steps, run.training.beta) == (1e-6, 200, 0.0)
    assert (run.sampling.temperature, run.agent.calls, run.training.max_length) == (1.0, 9, 24_576 + 16_384)
    assert run.batches(6) == (126 // 6 * 16, 126 // 6 * 16 // 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.steps=two", r"training\.steps is 'two': input should be a valid integer"),
        ("groups.size=1", r"groups: direct=4 and tool=4 don't fit in size=1.*Raise size, or force fewer"),
        ("groups.seize=4", r"groups\.seize is no key of a run; did you mean 'size'"),
        ("trainng.steps=3", "trainng is no key of a run; did you mean 'training'"),
        ("training.learning_rat=1", "did you mean 'learning_rate'"),
        ("objective.name=ppo", "objective: name='ppo': choose one of hdpo, contrast, grpo"),
        ("output", "write KEY=VALUE"),
        ("output.x=1", "no mapping"),
        ("model={}", r"model\.path is missing"),
        ("training.steps: [", "no mapping|KEY=VALUE"),
    ],
)
def test_a_wrong_key_is_named_with_its_rule(change: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_run("laptop", [change])


def test_every_setting_of_the_objective_reaches_the_trainer(tmp_path: Path) -> None:
    run = read_run("laptop", ["objective.name=coupled", "objective.eps=0.01", "objective.ddof=0", "objective.alpha=1"])
    assert _arguments(run, tmp_path).hdpo_objective == run.objective


def test_agreement_with_recorded_runs_rules_where_a_question_has_no_answer(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "runs") as store:
        store.append(Trajectory(id="r", question=question_of([HumanMessage("How many?")]), answer="42"))
    (tmp_path / "asked.jsonl").write_text('{"question": "How many?"}\n{"question": "Why?", "answer": "So."}\n')
    unanswered, answered = read_questions(tmp_path / "asked.jsonl")
    verify = verify_of_run(read_run("laptop", [f"agreement={tmp_path / 'runs'}"]), tmp_path)
    assert (verify(unanswered, "42.0"), verify(unanswered, "43")) == (True, False)
    assert (verify(unanswered, "About forty."), verify(answered, "So.")) == (None, True)  # no judge is named


def test_batches_that_do_not_divide_say_what_would(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"micro_batch is 7 .*such as micro_batch: 16"):
        read_run("laptop", ["training.micro_batch=7"]).batches(1)
    with pytest.raises(ConfigurationError, match="never spread over processes"):
        read_run("laptop").batches(3)


def test_files_that_are_not_there_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no file 'nowhere'.*'laptop'"):
        read_run("nowhere")
    (tmp_path / "bad.yaml").write_text("model: [")
    with pytest.raises(ConfigurationError, match="is no YAML"):
        read_run(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigurationError, match="mapping of keys"):
        read_run(tmp_path / "list.yaml")


def test_reporters_are_checked_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        check_reporters("wandb")
    with pytest.raises(ConfigurationError, match="'mlfow'"):
        check_reporters(["mlfow"])
    assert check_reporters("none") == ["none"]
