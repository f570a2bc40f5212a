"""A known error on the command line: one line with its remedy, whole, and exit code 1."""

import sys
from pathlib import Path

import pytest

import metis_agent.cli as cli
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
