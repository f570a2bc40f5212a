"""A known error on the command line: one line with its remedy, whole, and exit code 1."""

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
