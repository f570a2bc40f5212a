"""`metis demo --model`: SFT and HDPO on a model of one's own, through a kill, and what is refused before any work."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.cli.demo import _add_classes, show_examples
from metis_agent.cli.demo_model import Pretrained, _Stages, _template
from metis_agent.cli.output import write_json
from metis_agent.errors import (
    CheckpointError,
    ConfigurationError,
    InputError,
    MetisError,
    MissingDependencyError,
)
from metis_agent.judging.verifiers import verify
from metis_agent.models.chat_tokenizer import ChatTokenizer, named_opening, shows_tools
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.almanac.agent import COLD_START
from metis_agent.worlds.almanac.questions import questions

TOOLS = "metis_agent.worlds.almanac.agent:almanac_tools"
SMALL = [
    "training.questions_per_step=2", "groups.size=4", "groups.direct=1", "groups.tool=1", "sampling.max_new_tokens=24",
    "validation.direct=1", "agent.block_message=Error.", "sft.epochs=1", "sft.learning_rate=1e-3",
]  # fmt: skip


def asked(path: Path, count: int = 20) -> Path:
    rows = [
        {"id": it.id, "question": it.text, "answer": it.answer, "verifier": it.verifier, "kind": it.kind}
        for it in questions("train", count, seed=3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder: Path, *more: str, model: str | Path = COLD_START, file: Path | None = None) -> list[str]:
    file = file or asked(folder.parent / "questions.jsonl")
    changes = [word for change in SMALL for word in ("--set", change)]
    return [
        "demo", "--model", str(model), "--questions", str(file), "--folder", str(folder), "--steps", "1", "--samples",
        "1", "--tools", TOOLS, *changes, *more,
    ]  # fmt: skip


def lines(store: Path) -> set[str]:
    return {line for path in store.glob("*.jsonl") for line in path.read_text().splitlines()}


@pytest.mark.slow
def test_a_model_is_measured_started_warm_trained_and_measured_again_through_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "metis_agent.cli", *arguments(folder)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not (folder / "cold_start.json").exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -9
    assert not (folder / "metrics.json").exists()
    measured, curated = (lines(folder / "trajectories" / name) for name in ("as_is", "curated"))
    made = (folder / "cold_start" / "model.safetensors").stat().st_mtime_ns

    other = CliRunner().invoke(app, arguments(folder, "--set", "sft.epochs=2"))
    assert isinstance(other.exception, ConfigurationError)
    assert "sft.epochs was 1.0, now 2.0" in str(other.exception)

    again = CliRunner().invoke(app, arguments(folder))
    assert again.exit_code == 0, again.output + repr(again.exception)
    assert "Going on" in again.output
    # What was finished is not made again.
    assert "Runs to learn from" not in again.output
    assert measured == lines(folder / "trajectories" / "as_is")
    assert curated == lines(folder / "trajectories" / "curated")
    assert made == (folder / "cold_start" / "model.safetensors").stat().st_mtime_ns

    metrics = json.loads((folder / "metrics.json").read_text())
    held_out = {metrics[name]["questions"] for name in ("as_is", "cold_start", "hdpo")}
    assert len(held_out) == 1
    for name in ("as_is", "cold_start", "hdpo"):
        low, high = metrics[name]["intervals"]["accuracy"]
        assert 0 <= low <= metrics[name]["accuracy"] <= high <= 1
    assert [entry["step"] for entry in metrics["history"]] == [1]
    assert metrics["kept"]["kept"]["direct"] > 0
    assert metrics["kept"]["kept"]["tool"] > 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    # No question is both learnt from and measured on.
    learnt, measured_on = (
        {run.question.id for run in TrajectoryStore(folder / "trajectories" / name, read_only=True).read()}
        for name in ("train", "hdpo")
    )
    assert learnt
    assert not learnt & measured_on
    # Adapters were trained, and what is left is a whole model that keeps its tools in the prompt.
    assert not list(folder.glob("*/adapter_*"))
    chat = LocalChatModel.load(folder / "policy", max_new_tokens=8)
    assert chat.offers_tools_when_direct
    assert not same_weights(chat.model, LocalChatModel.load(folder / "cold_start").model)
    assert not same_weights(chat.model, LocalChatModel.load(COLD_START).model)

    finished = CliRunner().invoke(app, arguments(folder))
    assert (finished.exit_code, "--fresh" in finished.output) == (0, True)
    assert "metis report --store" in finished.output


def same_weights(one: Any, other: Any) -> bool:
    return all(bool((a == b).all()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def refused(words: list[str]) -> MetisError:
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, MetisError), done.output + repr(done.exception)
    return done.exception


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--tools", "no.such:tool"], ConfigurationError, "can't be imported"),
        (["--hold-out", "1.0"], ConfigurationError, "--hold-out 1.0: a share"),
        (["--hold-out", "0.05"], InputError, r"to learn from and \d held out: it needs 2 .*and 5 at least"),
        (["--set", "sft.epocs=1"], ConfigurationError, "sft.epocs: there is no such setting"),
        (["--set", "sft.epochs=many"], ConfigurationError, "sft.epochs is 'many': Input should be a valid number"),
        (
            ["--set", "sft.epochs=0"],
            ConfigurationError,
            r"--set sft: SftSettings\(epochs=0.0\): it must be more than 0",
        ),
        (["--set", "output=elsewhere"], ConfigurationError, "--set output: --folder says this"),
        (["--set", "model.path=m"], ConfigurationError, "--set model.path: --model says this"),
        (["--set", "agent.tools=[]"], ConfigurationError, "--set agent.tools: --tools says this"),
        (["--set", "questions.train=q.csv"], ConfigurationError, "--set questions.train: --questions says this"),
        (["--set", "training.seed=3"], ConfigurationError, "--set training.seed: --seed says this"),
        (["--set", "training.steps=9"], ConfigurationError, "--set training.steps: --steps says this"),
        (["--set", "trainin.steps=1"], ConfigurationError, "did you mean 'training'"),
        (["--chat-template", "none.jinja"], ConfigurationError, "no such file; name one, or 'chatml'"),
    ],
)
def test_a_wrong_option_is_refused_before_any_work(
    more: list[str], error: type[MetisError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        raise refused(arguments(tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_an_agent_without_tools_has_nothing_to_decide(tmp_path: Path) -> None:
    words = arguments(tmp_path / "run")
    place = words.index("--tools")
    with pytest.raises(ConfigurationError, match=r"no tools.*--tools MODULE:ATTRIBUTE"):
        raise refused([*words[:place], *words[place + 2 :]])


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("./nowhere", CheckpointError, "There is no folder './nowhere'"),
        ("nowhere.gguf", CheckpointError, "There is no file 'nowhere.gguf'"),
        ("owner/name", CheckpointError, r"the Hub gives none.*hf download owner/name --local-dir FOLDER"),
    ],
)
def test_a_model_that_is_not_there_says_where_to_get_it(
    model: str, error: type[MetisError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        raise refused(arguments(tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


def test_a_gguf_file_names_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        raise refused(arguments(tmp_path / "run", model=tmp_path / "model.gguf"))


def test_a_model_without_a_chat_template_is_refused_unless_one_is_given(tmp_path: Path) -> None:
    bare = shutil.copytree(COLD_START, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"has no chat template.*Use the instruct variant"):
        raise refused(arguments(tmp_path / "run", model=bare))
    from metis_agent.models.checkpoint import load_checkpoint

    assert load_checkpoint(bare, chat_template="{{ messages }}").tokenizer.chat_template == "{{ messages }}"


def test_questions_without_answers_are_named(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "Who?", "answer": "I."}\n{"question": "Why?"}\n')
    with pytest.raises(InputError, match=r"1 of 2 questions .* have no answer, the first 'Why\?'"):
        raise refused(arguments(tmp_path / "run", file=file))
    with pytest.raises(ConfigurationError, match="needs --questions FILE"):
        raise refused(["demo", "--model", str(COLD_START), "--tools", TOOLS])


def test_where_too_few_runs_are_right_it_says_how_many_and_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    said = [*(f"Say {n}?" for n in range(16)), "Say " + "so " * 5_000]  # of which the last is too long for the model
    file.write_text("".join(json.dumps({"question": text, "answer": "zebra"}) + "\n" for text in said))
    done = CliRunner().invoke(app, arguments(tmp_path / "run", file=file))
    with pytest.raises(InputError, match=r"0 of \d+ questions have a right run.*--system-prompt.*larger model"):
        raise done.exception or AssertionError(done.output)
    assert "3 of " in done.output
    assert "runs failed and are left out, the first with 'InputError: The prompt has" in " ".join(done.output.split())


@pytest.mark.parametrize(
    "words",
    [["--questions", "file.jsonl"], ["--questions", "4"], ["--tools", TOOLS], ["--hold-out", "0.4"], ["--samples", "4"],
     ["--ends-only"], ["--world", "gallery", "--model", "m"]],
)  # fmt: skip
def test_without_a_model_the_demo_is_as_it_was(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["demo", *words])
    assert done.exit_code == 2
    assert "--model" in done.stderr


def test_the_packaged_template_shows_tools_and_its_calls_are_read() -> None:
    tokenizer = AutoTokenizer.from_pretrained(COLD_START)
    tokenizer.chat_template = _template("chatml")
    schema = {"type": "function", "function": {"name": "python", "parameters": {"required": ["code"]}}}
    chat = ChatTokenizer(tokenizer, eos_ids=frozenset())
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 * 7?"}]
    shown = chat.render(ask, [schema], reply=True)
    assert shown.startswith("<|im_start|>system\nBe brief.\n\nYou may call a function.")
    assert '{"name": "python", "parameters": {"required": ["code"]}}' in shown
    assert shown.endswith("<|im_start|>user\n6 * 7?<|im_end|>\n<|im_start|>assistant\n")
    assert "function" not in chat.render(ask, [], reply=True)
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "6*7"}}}
    done = [*ask, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "42"}]
    assert chat.render(done, [schema], reply=True) == shown + (
        '<tool_call>\n{"name": "python", "arguments": {"code": "6*7"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert '{"name": "python"' in chat.decode(named_opening(chat, schema))


def test_a_template_that_shows_no_tools_is_told_from_one_that_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(COLD_START)
    assert not shows_tools(tokenizer)
    tokenizer.chat_template = _template("chatml")
    assert shows_tools(tokenizer)


PROMPT = 'Say "a: b"\nso \x7f \U0001f600'


def test_what_the_command_fixes_overrides_the_file(tmp_path: Path) -> None:
    own = Pretrained(
        model="m", questions="q.jsonl", tools=("a:b",), folder=tmp_path, seed=7, steps=3,
        system_prompt=PROMPT, changes=("model.lora=null", "sft.batch=2"),
    )  # fmt: skip
    run, fine = own.configured()
    assert (run.training.steps, run.training.seed, run.agent.system_prompt) == (3, 7, PROMPT)
    assert (run.model.lora, fine.lora, fine.batch, fine.seed, fine.learning_rate) == (None, 0, 2, 7, 2e-5)
    assert Pretrained(model="m", questions="q.jsonl").configured()[1].lora == 16


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ((), 5e-5),
        (("model.lora=null",), 1e-6),
        (("model.lora=null", "training.learning_rate=1e-5"), 1e-5),
        (("training.learning_rate=5.0e-5", "model.lora=null"), 5e-5),
    ],
)
def test_all_weights_are_trained_at_a_rate_of_their_own(changes: tuple[str, ...], rate: float) -> None:
    run, _ = Pretrained(model="m", questions="q.jsonl", changes=changes).configured()
    assert run.training.learning_rate == rate


def test_the_folder_is_the_runs_before_a_judge_puts_anything_there(tmp_path: Path) -> None:
    with pytest.raises(MetisError, match="nobody"):
        raise refused(arguments(tmp_path / "run", "--set", "judge=nobody:nothing"))
    assert (tmp_path / "run" / "run.json").exists()


def test_a_finished_run_is_not_taken_for_one_with_other_settings(tmp_path: Path) -> None:
    folder, judge = tmp_path / "run", ("--set", "judge=nobody:nothing")
    refused(arguments(folder, *judge))  # which has begun
    (folder / "metrics.json").write_text("{}")
    done = CliRunner().invoke(app, arguments(folder, *judge))
    assert (done.exit_code, "is finished" in " ".join(done.output.split())) == (0, True)
    with pytest.raises(ConfigurationError, match=r"model was .*, now 'owner/other'"):
        raise refused(arguments(folder, *judge, model="owner/other"))


def test_a_cold_start_that_is_there_is_not_prepared_for_again(tmp_path: Path) -> None:
    run, fine = Pretrained(model="m", questions="q.jsonl", folder=tmp_path).configured()
    stages = _Stages(run=run, folder=tmp_path, tools=[], verify=verify, console=Console())
    write_json(tmp_path / "cold_start.json", {"kept": {"direct": 4, "tool": 3}, "rows": 7, "losses": [0.5]})
    # Without it, the model that is nowhere would have been asked.
    found = stages.cold_start(tmp_path / "nowhere", questions("train", 2, seed=3), 1, fine, None)
    assert found == {"kept": {"direct": 4, "tool": 3}}


def test_what_questions_answers_and_errors_say_is_no_markup(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    it = Trajectory(id="1", question=Question(id="q", text="[b]Which?[/b]"), answer="[red]none", branch="free")
    probes = SimpleNamespace(kinds={"[u]kind": SimpleNamespace(accuracy=None)})
    measured: Any = SimpleNamespace(trajectories=[it], classes={}, forced={"direct": probes})
    show_examples(console, {"as it is": measured}, lambda question: question.text)
    run, _ = Pretrained(model="m", questions="q.jsonl").configured()
    with _Stages(run=run, folder=tmp_path, tools=[], verify=verify, console=console)._counted("runs", 1) as count:
        count(replace(it, status="failed", error="[i]no[/i]"))
    table = Table("", "as it is")
    _add_classes(table, [measured])
    console.print(table)
    printed = console.export_text()
    assert all(text in printed for text in ("[b]Which?[/b]", "[red]none", "[i]no[/i]", "[u]kind"))
