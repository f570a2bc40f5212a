"""Options are the library's settings: the same names, defaults and words, and nothing that a line can't give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from metis_agent.cli.training_options import takes_settings


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of something."""

    rate: float = 0.5
    """How fast,
    in something a second."""
    sure: bool = False
    limit: int | None = None
    named: Annotated[str, typer.Option("--called", help="Its own words.")] = "x"
    extra: dict[str, int] = field(default_factory=dict)
    """Nothing for a command line."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate below 0")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @takes_settings
    def show(name: str, settings: Settings) -> None:
        print(name, settings)

    return app


def test_a_command_takes_the_fields_of_a_class(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["a"]).output.strip() == f"a {Settings()}"
    given = CliRunner().invoke(app, ["a", "--rate", "2", "--sure", "--limit", "3", "--called", "y"])
    assert given.output.strip() == f"a {Settings(rate=2.0, sure=True, limit=3, named='y')}"
    assert isinstance(CliRunner().invoke(app, ["a", "--rate", "-1"]).exception, ValueError)


def test_help_is_the_documentation_of_the_class(app: typer.Typer) -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output.split())
    assert "How fast, in something a second. [default: 0.5]" in shown
    assert "Its own words." in shown
    assert "extra" not in shown


def test_an_option_that_is_not_there_is_refused(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["a", "--extra", "1"]).exit_code == 2
