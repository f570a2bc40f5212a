"""The folder of a run: emptied of what a run makes, kept for one that was stopped, and never somebody else's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from metis_agent.cli.output import prepare_folder
from metis_agent.errors import ConfigurationError


def prepare(folder: Path, *, fresh: bool = False, **settings: object) -> str:
    console = Console(record=True, file=io.StringIO())
    prepare_folder(folder, settings, console, parts=("policy", "figures.json"), option="--out", fresh=fresh)
    return console.export_text()


def run_in(folder: Path) -> Path:
    """What a run has made."""
    prepare(folder, seed=0)
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_text("w")
    (folder / "figures.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_stopped_run_goes_on_with_everything_there(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "new" / "run")
    assert "Going on" in prepare(folder, seed=0)
    assert (folder / "policy" / "weights").read_text() == "w"


def test_a_fresh_run_clears_what_a_run_makes_and_nothing_else(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    assert prepare(folder, fresh=True, seed=1) == ""
    assert {path.name for path in folder.iterdir()} == {"run.json", "notes.txt"}
    assert json.loads((folder / "run.json").read_text())["seed"] == 1


def test_other_settings_are_named_and_nothing_is_touched(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"seed was 0, now 1.*--fresh to start again, or another --out"):
        prepare(folder, seed=1)
    assert (folder / "policy" / "weights").read_text() == "w"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_no_runs_is_left_alone(fresh: bool, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "precious").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other files; name another --out"):
        prepare(tmp_path, fresh=fresh, seed=0)
    assert (tmp_path / "policy" / "precious").read_text() == "mine"
