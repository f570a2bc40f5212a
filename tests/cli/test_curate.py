"""`metis curate` and `metis train sft` as a user runs them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import ConfigurationError
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question
from tests.curation.runs import python, run

TOOLS = '''
from langchain_core.tools import tool

@tool
def python(code: str) -> str:
    """Calculate."""
    return str(eval(code))

TOOLS = [python]
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_tools.py").write_text(TOOLS)
    with TrajectoryStore(tmp_path / "store") as store:
        for number in range(12):
            result = "43" if number == 3 else "42"
            asked = Question(
                id=f"q{number % 6}", text=f"Question {number % 6}: 6 times 7?", answer="42", verifier="numeric"
            )
            answer = "41" if number >= 9 else "42"
            store.append(run(python("6*7", result), id=f"run/{number}", question=asked, answer=answer))
    return tmp_path


def metis(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(it) for it in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_sft_says_what_it_did_and_what_it_did_not(folder: Path) -> None:
    arguments = (
        "curate", "sft", "--store", folder / "store", "--out", folder / "out", "--tools", f"{folder}/my_tools.py:TOOLS",
        "--no-python", "--json", folder / "figures.json",
    )  # fmt: skip
    for _ in range(2):  # the second run finds that all is done
        shown = metis(*arguments)
        assert "12 in = 8 kept + 4 dropped + 0 undecided." in shown
        assert "--base" in shown
        assert "--judge" in shown
    figures = json.loads((folder / "figures.json").read_text())
    stages = {stage["name"]: stage["dropped"] for stage in figures["stages"]}
    assert stages["answers"] == {"wrong answer": 3}
    assert stages["replay"] == {"result does not match the record": 1}
    assert len(figures["not_run"]) == 2


def test_rl_keeps_the_mixed_prompts(folder: Path) -> None:
    shown = metis("curate", "rl", "--store", folder / "store", "--out", folder / "out")
    assert "6 in = 3 kept + 3 dropped + 0 undecided." in shown
    kept = [json.loads(line)["id"] for line in (folder / "out/kept/segment-00000000.jsonl").read_text().splitlines()]
    assert kept == ["q3", "q4", "q5"]
    again = metis("curate", "rl", "--store", folder / "store", "--out", folder / "two", "--test", folder / "out/kept")
    assert "asks a test question" in again.replace("\n", " ") or "0 kept" in again


def test_a_rubric_is_a_file_to_edit(folder: Path) -> None:
    assert "relevant" in metis("curate", "rubric", "strategy")
    metis("curate", "rubric", "answer", "--out", folder / "mine.md")
    assert "reference" in (folder / "mine.md").read_text()
    with pytest.raises(ConfigurationError, match="there already"):
        metis("curate", "rubric", "answer", "--out", folder / "mine.md")


@pytest.mark.parametrize("command", [("curate", "sft"), ("curate", "rl"), ("train", "sft")])
def test_help_teaches(command: tuple[str, ...]) -> None:
    shown = metis(*command, "--help")
    assert "Example: metis" in shown
    assert "stopped" in shown
