"""`metis report` as somebody runs it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import CheckpointError, ConfigurationError, InputError, MetisError, StorageError
from tests.report.stores import AFTER, BEFORE, store
from tests.report.test_inputs import STEP, write


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments])
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_page_and_its_figures(tmp_path: Path) -> None:
    out, figures = tmp_path / "new" / "report.html", tmp_path / "figures.json"
    said = run(
        "--store", store(tmp_path / "after", AFTER), "--before", store(tmp_path / "before", BEFORE),
        "--history", str(write(tmp_path / "history.json", {"history": [STEP]})), "--out", str(out),
        "--json", str(figures), "--title", "Ours",
    )  # fmt: skip
    assert "37 runs to look at" in said
    assert "<title>Ours</title>" in out.read_text()
    found = json.loads(figures.read_text())
    assert found["changes"]["calls"]["difference"]["value"] == pytest.approx(-0.4)


def test_a_store_alone_is_enough_and_bad_lines_are_told(tmp_path: Path) -> None:
    url = store(tmp_path / "after", AFTER)
    with next((tmp_path / "after").glob("*.jsonl")).open("a") as file:
        file.write("nonsense\n")
    said = run("--store", url, "--out", str(tmp_path / "x.html"), "--decisions", "0")
    assert "1 lines of" in said
    assert "0 runs to look at" in said


def test_what_is_wrong_is_said_before_any_page_is_written(tmp_path: Path) -> None:
    url, out = store(tmp_path / "after", AFTER), str(tmp_path / "x.html")
    with pytest.raises(StorageError, match="can't be read"):
        run("--store", str(tmp_path / "none"), "--out", out)
    with pytest.raises(CheckpointError, match="no gate"):
        run("--store", url, "--gate", str(tmp_path), "--out", out)
    with pytest.raises(InputError, match="can't be read"):
        run("--store", url, "--evaluation", str(tmp_path / "none.json"), "--out", out)
    with pytest.raises(InputError, match="no list of steps"):
        run("--store", url, "--history", str(write(tmp_path / "h.json", {})), "--out", out)
    with pytest.raises(ConfigurationError, match="two names"):
        run("--store", url, "--out", out, "--json", out)
    assert not Path(out).exists()
