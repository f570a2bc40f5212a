"""A known error on the command line: one line with its remedy, whole, and exit code 1."""

import io
import re
import sys
from pathlib import Path

import pytest
from rich.table import Table

import metis_agent.cli as cli
from metis_agent.cli.output import Screen
from metis_agent.errors import ConfigurationError


def test_brackets_in_an_error_are_not_taken_for_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConfigurationError("install it with: pip install 'langgraph-metis[train]' [/bold]")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert "'langgraph-metis[train]' [/bold]" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("model", "reason"),
    [("openai:gpt-5", "OPENAI_API_KEY"), ("nobody:gpt-5", "nobody"), ("no/folder", "no/folder")],
)
def test_a_model_that_can_not_be_opened_is_one_line(
    model: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "look.py").write_text('def look(word: str) -> str:\n    """Look."""\n    return word\n')
    monkeypatch.setattr(
        sys, "argv", ["metis", "ask", "hi", "--model", model, "--tools", f"{tmp_path / 'look.py'}:look"]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (1, 1)
    assert said.startswith(f"ConfigurationError: the model {model!r} can't be opened: ")
    assert reason in said


NAMES = (
    "a[/x]b", "[link=http://evil]x[/link]", "[@click=app.quit]x", "[bold", "[/]", "\\[x", "[red]x[/red]", "a\rb",
    "\x1bcEVIL\u202e", "\x9b31mred", "\x1b]0;title\x07", "\u2028x\u200b", "\u2066x\ufeff", ":smile:\U000e0041",
    "\udc80", "x" * 3000,
)  # fmt: skip
"""What somebody else may have named a tool, a model, a file."""
CONTROLS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:40]))
def test_a_name_stays_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the screen, in a table, in an error: no markup, no link, nothing that the terminal obeys."""
    written = io.StringIO()
    console = Screen(file=written, width=4000, force_terminal=True, color_system=None)
    table = Table(name, title=name)
    table.add_row(name)
    for shown in (name, f"The tool {name!s} is new.", table):
        console.print(shown)
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["ask", "hi", "--gate", name],
        ["ask", "hi", "--model", name, "--tools", name],
        ["import", f"{tmp_path}/{name}", "--store", "runs"],
        ["train", "gate", "--store", f"{tmp_path}/{name}", "--out", "gate"],
        ["push", "gate", "--repo", name, "--dry-run"],
    ):
        monkeypatch.setattr(sys, "argv", ["metis", *arguments])
        monkeypatch.setattr(sys, "stderr", said := io.StringIO())
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert (stopped.value.code, said.getvalue().count("\n")) == (1, 1), arguments
        written.write(said.getvalue())
    assert CONTROLS.findall(written.getvalue().replace("\n", "")) == []
