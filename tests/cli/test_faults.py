"""Every command of the docs with each fault of its surroundings: one line with the remedy, and exit code 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metis_agent.cli as cli
from metis_agent.recording.store import TrajectoryStore
from tests.gates.test_artefact import write
from tests.recording.test_hostile_store import TOOL, run
from tests.test_layers import EXTRAS

OPENAI = ["--model", "openai:gpt-5", "--tools", "my_tools.py:look"]
OWN = ["--model", "my_tools.py:model", "--tools", "my_tools.py:look"]
COMMANDS = {
    "doctor": ["doctor", "--store", "out"],
    "demo": ["demo", "--folder", "out/demo", "--steps", "1"],
    "demo, pictures": ["demo", "--world", "gallery", "--folder", "out/demo"],
    "ask": ["ask", "hi", *OPENAI],
    "ask with a gate": ["ask", "hi", "--gate", "no-gate", *OWN],
    "import": ["import", "chats.jsonl", "--store", "out/imported"],
    "rollout": ["rollout", "questions.jsonl", *OPENAI, "--store", "out/runs"],
    "rollout own": ["rollout", "questions.jsonl", *OWN, "--read-only", "look", "--store", "out/runs"],
    "rollout with a judge": ["rollout", "questions.jsonl", *OWN, "--store", "out/runs", "--verifier", "judge",
                             "--judge", "openai:gpt-5"],
    "train gate": ["train", "gate", "--store", "runs", "--hold-out", "0.4", "--out", "out/gate"],
    "train gate, a table": ["train", "gate", "--outcomes", "outcomes.csv", "--tool", "look=look", "--out", "out/gate"],
    "train gate, encoder": ["train", "gate", "--store", "runs", "--policy", "encoder", "--model", "no/folder", "--out",
                            "out/gate"],
    "calibrate, a gate": ["calibrate", "gate", "--store", "runs", "--accuracy-loss", "0.3"],
    "evaluate, a gate": ["evaluate", "gate", "gate", "--store", "runs", "--json", "out/figures.json"],
    "calibrate": ["calibrate", "no-gate", "--store", "runs", "--drop-seen", "--accuracy-loss", "0.1"],
    "evaluate gate": ["evaluate", "gate", "no-gate", "--store", "runs", "--json", "out/figures.json"],
    "evaluate benchmark": ["evaluate", "benchmark", "vstar", *OPENAI, "--data", "no-data", "--store", "out/v"],
    "audit": ["audit", "--store", "runs", "--model", "openai:gpt-5", "--reads", "*", "--out", "out/audit.html"],
    "report": ["report", "--store", "runs", "--out", "out/report.html"],
    "drift": ["drift", "no-gate", "--store", "runs"],
    "push": ["push", "no-gate", "--repo", "me/gate"],
    "push, a gate": ["push", "gate", "--repo", "me/gate"],
    "curate sft": ["curate", "sft", "--store", "runs", "--out", "out/sft"],
    "curate sft with a judge": ["curate", "sft", "--store", "runs", "--judge", "openai:gpt-5", "--out", "out/sft"],
    "curate rubric": ["curate", "rubric", "answer", "--out", "out/rubric.md"],
    "curate rl": ["curate", "rl", "--store", "runs", "--out", "out/rl"],
    "train sft": ["train", "sft", "--data", "out/sft/kept", "--model", "no/folder", "--out", "out/model"],
    "train policy": ["train", "policy", "--config", "laptop", "--set", "output=out/model", "--check"],
}  # fmt: skip
WALK = """
import contextlib, io, json, sys, time
if fault == "no extra":
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in extras:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
from metis_agent.cli import main
if fault == "full disk":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
ended = {}
for name, arguments in commands.items():
    sys.argv = ["metis", *arguments]
    said, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(error):
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as raised:
            code = repr(raised)
    ended[name] = code, error.getvalue(), said.getvalue()
print(json.dumps(ended))
"""
PAID = "asked the model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "my_tools.py").write_text(
        "from langchain_core.language_models.fake_chat_models import GenericFakeChatModel\n\n"
        "class Model(GenericFakeChatModel):\n    def bind_tools(self, tools, **_):\n        return self\n\n"
        'def look(word: str) -> str:\n    """Look."""\n    return word\n\n'
        f"def words():\n    while True:\n        open('paid', 'a').close()\n        yield {PAID!r}\n\n"
        "model = Model(messages=words())\n"
    )
    (folder / "questions.jsonl").write_text('{"question": "What is 2 plus 3?", "answer": "5"}\n')
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (folder / "outcomes.csv").write_text(
        "question,direct_correct,look_correct\n" + "".join(f"q{i},{i % 2},1\n" for i in range(60))
    )
    with TrajectoryStore(folder / "runs") as store:
        for i in range(120):
            for branch in ("direct", "tool"):
                store.append(run(i, branch))
    (folder / "gate").mkdir()
    write(folder / "gate", tools=[{"name": TOOL}])
    return folder


WRONG_MODELS = ("nobody:gpt-5", "no/such/folder", "my_tools.py:nothing")


def commands() -> Iterator[tuple[str, set[str]]]:
    """Every command that there is, with its options."""
    for name in cli._COMMANDS:
        found = cli.command(name)
        for inner, each in getattr(found, "commands", {"": found}).items():
            yield f"{name} {inner}".strip(), {option for parameter in each.params for option in parameter.opts}


def first_of(command: str) -> list[str]:
    """The first of `COMMANDS` that calls it."""
    words = command.split()
    return next(arguments for arguments in COMMANDS.values() if arguments[: len(words)] == words)


def with_wrong_models() -> dict[str, list[str]]:
    """Each command with each of its options that take a model, naming none."""
    made = {}
    for command, options in commands():
        for option in sorted(options & {"--model", "--judge", "--extractor"}):
            for wrong in WRONG_MODELS:
                before = first_of(command)
                at = before.index(option) if option in before else len(before)
                made[f"{command} {option} {wrong}"] = [*before[:at], option, wrong, *before[at + 2 :]]
    return made


def test_no_command_is_forgotten() -> None:
    for command, _ in commands():
        assert first_of(command)
    assert len(with_wrong_models()) >= 3 * 11


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "fault",
    [
        "no extra",
        *(pytest.param(fault, marks=pytest.mark.exhaustive) for fault in ("no key", "full disk", "wrong model")),
    ],
)
def test_every_command_says_it_in_one_line(fault: str, folder: Path) -> None:
    # Where a fault lets a model of one's own be asked, it leaves this file: an earlier fault's is not this one's.
    (folder / "paid").unlink(missing_ok=True)
    chosen = with_wrong_models() if fault == "wrong model" else COMMANDS
    if fault == "no key":
        chosen = {name: arguments for name, arguments in COMMANDS.items() if "openai:gpt-5" in arguments}
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_KEY")}
    if fault == "wrong model":
        environment["OPENAI_API_KEY"] = "none"
    code = f"fault, extras, commands = {fault!r}, {EXTRAS!r}, {chosen!r}\n{WALK}"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=550,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    ended = json.loads(ran.stdout.splitlines()[-1])
    assert set(ended) == set(chosen)
    for name, (code, error, _) in ended.items():
        assert code in (0, 1), (name, code, error)
        if code == 1 and name != "doctor":
            assert error.count("\n") == 1, (name, error)
            assert "Error: " in error
            assert any(mark in error for mark in (". ", ": ", "; ")), (name, error)
        assert code or "openai:gpt-5" not in chosen[name], name
        if fault == "wrong model":
            assert code == 1, name
            option, wrong = name.split()[-2:]
            assert wrong.rpartition(":")[2] in error or option in error, (name, error)
    if fault != "no extra":
        assert not (folder / "paid").exists()
