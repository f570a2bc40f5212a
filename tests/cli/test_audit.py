"""`metis audit` as somebody runs it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import ConfigurationError, InputError, MetisError
from metis_agent.recording.store import TrajectoryStore
from tests.audit.recorded import look, run

MODEL = """
from tests.fakes import model

asked = []


def answer(messages):
    asked.append(messages)
    found = [message.text for message in messages if message.type == "tool"]
    return found[-1] if found else "It is not known."


def chat():
    return model(answer)
"""


def audit(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(
        app,
        ["audit", "--store", str(folder / "runs"), "--work", str(folder / "work"), "--out", str(folder / "audit.html"),
         *arguments],
    )  # fmt: skip
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of 12 turns: one needed and one redundant call each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"bot_{tmp_path.name}.py").write_text(MODEL)
    with TrajectoryStore(tmp_path / "runs") as store:
        for n in range(12):
            found = look(str(n), result=f"number {n}")
            store.append(
                run(f"t{n}", f"Which is {n}?", found, found, answer=f"Number {n}.", metadata={"model": "gpt-4o"},
                    usage={"input_tokens": 1_000, "output_tokens": 10})
            )  # fmt: skip
    return tmp_path


def model_of(folder: Path) -> tuple[str, str]:
    return "--model", f"bot_{folder.name}.py:chat"


def test_a_dry_run_says_what_it_will_cost_and_asks_nothing(folder: Path) -> None:
    said = audit(folder, "--reads", "look", "--dry-run", "--json", str(folder / "plan.json"))
    # Two states of 12 turns, answer and self-report; the model is the recorded one.
    assert "48 probes of gpt-4o to make" in said
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["probes"], plan["read"], plan["model"]) == (48, 48_000 + 24 * 40, "gpt-4o")
    assert plan["dollars"] == pytest.approx(48_960 * 2.5e-6 + (24 * 10 + 24 * 2) * 10e-6)
    assert not (folder / "audit.html").exists()


def test_an_audit_its_page_and_its_figures(folder: Path) -> None:
    options = (*model_of(folder), "--reads", "*", "--judge", "none", "--json", str(folder / "f.json"))
    said = audit(folder, *options)
    # Without a judge "It is not known." has no verdict beside "Number 3.", so nothing can be said.
    assert "12 turns lack a verdict" in said
    assert "12 needs a judge" in said
    assert "none of which could be judged" in said
    assert "48 probes" in said
    again = audit(folder, *options)
    assert "0 probes" in again
    assert "48 were made before" in again
    figures = json.loads((folder / "f.json").read_text())
    assert figures["probes"]["cached"] == 48
    assert figures["store"]["tools"] == {"look": {"effect": "reads", "calls": 24}}
    assert "<h2>By tool</h2>" in (folder / "audit.html").read_text()


JUDGE = """
import re

from tests.judging.judges import SimulatedJudge


def rule(record):
    filler = {"the", "code", "name", "that", "was", "asked", "for", "is", "it"}
    first, second = (set(re.findall(r"[\\w-]+", record[key].casefold())) - filler for key in ("first", "second"))
    return {"reason": "compared", "same": first == second}


def judge():
    return SimulatedJudge(rule=rule)
"""


def test_a_judge_and_a_persons_check(folder: Path) -> None:
    (folder / f"judge_{folder.name}.py").write_text(JUDGE)
    options = (*model_of(folder), "--reads", "look", "--judge", f"judge_{folder.name}.py:judge", "--no-self-report")
    said = audit(folder, *options, "--check", "5")
    assert re.search(r"Of 24 tool calls in 12 turns, 50%.\[\d+,.\d+\] changed nothing", said)
    page = (folder / "work" / "check.html").read_text()
    pairs = re.findall(r'data-turn="([^"]+)" data-state="(\d+)"', page)
    assert len({turn for turn, _ in pairs}) == 5
    lines = [json.dumps({"turn": turn, "state": int(state), "agrees": False}) for turn, state in pairs]
    (folder / "checked.jsonl").write_text("\n".join(lines))
    said = audit(folder, *options, "--checked", str(folder / "checked.jsonl"))
    assert "A person checked 5 turns" in said


def test_tools_of_which_nobody_said_what_they_do(folder: Path) -> None:
    with pytest.raises(InputError, match="--reads look"):
        audit(folder, *model_of(folder), "--judge", "none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--reads", "look", "--acts", "look"), "'look'"),
        (("--tool-cost", "look"), "NAME=DOLLARS"),
        (("--tool-cost", "look=-1"), "NAME=DOLLARS"),
        (("--reads", "look", "--budget", "1", "--model", "mine"), "price of 'mine' is unknown"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_asked(folder: Path, options: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        audit(folder, *options, "--dry-run")


def test_decision_points_are_written_where_they_are_asked_for(folder: Path) -> None:
    said = audit(folder, *model_of(folder), "--reads", "look", "--judge", "none", "--points", str(folder / "p.jsonl"))
    # Without a judge nothing rules on these answers.
    assert "0 decision points" in said
    assert (folder / "p.jsonl").read_text() == ""
