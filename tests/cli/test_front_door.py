"""The command line as a whole: the path that its help shows, exit codes, completions, and figures for scripts."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import metis_agent
from metis_agent import cli
from metis_agent.cli import app
from metis_agent.cli.doctor import _EXTRAS
from metis_agent.cli.output import write_json
from metis_agent.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


def leaves() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))
        if not hasattr(command, "commands"):
            found[" ".join(words)] = command

    for name in cli._COMMANDS:
        walk(cli.command(name), (name,))
    return found


def test_help_lists_the_path_in_its_order() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    order = (
        "demo", "ask", "doctor", "import", "rollout", "curate", "train", "calibrate", "evaluate", "audit", "report",
        "drift", "push",
    )  # fmt: skip
    places = [shown.index(f"│ {name} ") for name in order]
    assert places == sorted(places)
    assert set(order) == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_the_list_says_what_each_command_says_itself() -> None:
    for name, entry in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert entry.help == " ".join(inspect.cleandoc(cli.command(name).help).partition("\n\n")[0].split())


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"langgraph-metis {metis_agent.__version__}\n")


def test_every_command_says_what_it_does_and_shows_an_example() -> None:
    for words, command in leaves().items():
        assert command.help, words
        if words not in ("demo", "doctor"):
            assert f"Example: metis {words}" in command.help or "Example: accelerate" in command.help, words
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", ""), f"{words} {parameter.name}"


def test_whatever_has_figures_gives_them_to_scripts() -> None:
    without = {words for words, command in leaves().items() if "--json" not in str([it.opts for it in command.params])}
    assert without == {"demo", "curate rubric", "push"}  # the demo always writes metrics.json


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_json(Path("-"), {"auc": float("nan"), "n": 3})
    assert json.loads(capsys.readouterr().out) == {"format": 1, "auc": None, "n": 3}
    (questions := tmp_path / "questions.jsonl").write_text('{"question": "What is 7 plus 5?", "answer": "12"}\n')
    (tmp_path / "my_tools.py").write_text('def look(word: str) -> str:\n    """Look."""\n    return word\n')
    (tmp_path / "my_model.py").write_text("from tests.fakes import model\nchat = model('12')\n")
    arguments = [
        "rollout",
        str(questions),
        "--model",
        f"{tmp_path / 'my_model.py'}:chat",
        "--store",
        str(tmp_path / "runs"),
    ]
    tools = ["--tools", f"{tmp_path / 'my_tools.py'}:look", "--dry-run", "--json", "-"]
    result = CliRunner().invoke(app, [*arguments, *tools], catch_exceptions=False)
    figures = json.loads(result.stdout)
    assert (figures["format"], figures["runs"], figures["dry_run"]) == (1, 2, True)
    assert "1 questions" in result.stderr


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The exit code of `metis` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["metis", *arguments])
    # Its name, which completion goes by, is that of the program; these tests may run as `python -m pytest`.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_help_is_no_error_and_misuse_is_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, "--help") == 0
    for wrong in ((), ("no-such-command",), ("ask", "--no-such-option"), ("calibrate",), ("demo", "--steps", "0")):
        assert ended(monkeypatch, *wrong) == 2, wrong


def test_errors_are_one_line_with_the_remedy_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = typer.Typer(pretty_exceptions_enable=False)

    @failing.command()
    def known() -> None:
        raise ConfigurationError("[bold]3[/] is no value; " + "it has to be two, " * 20 + "run: pip install 'x[y]'")

    @failing.command()
    def stopped() -> None:
        raise KeyboardInterrupt

    @failing.command()
    def bug() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", failing)
    assert ended(monkeypatch, "known") == 1
    said = capsys.readouterr().err
    assert said.startswith("ConfigurationError: [bold]3[/] is no value")
    assert said.endswith("run: pip install 'x[y]'\n")
    assert said.count("\n") == 1
    assert ended(monkeypatch, "stopped") == 130
    assert "Run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["metis", "bug"])
    with pytest.raises(RuntimeError, match="a bug"):  # with its traceback: it is ours to mend
        cli.main()


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("bash", {"COMP_WORDS": "metis tr", "COMP_CWORD": "1"}), ("zsh", {"_TYPER_COMPLETE_ARGS": "metis tr"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "metis tr", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)  # fmt: skip
def test_a_shell_completes_commands(
    shell: str, words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"_METIS_COMPLETE": f"complete_{shell}", **words}.items():
        monkeypatch.setenv(name, value)
    assert ended(monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "train" in shown
    assert "report" not in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_and_installed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # Which shell this is, is told by the processes above it.
    for module in ("typer.completion", "typer._completion_shared"):
        monkeypatch.setattr(f"{module}._get_shell_name", lambda: shell)
    assert ended(monkeypatch, "--show-completion") == 0
    assert "_METIS_COMPLETE" in capsys.readouterr().out
    assert ended(monkeypatch, "--install-completion") == 0
    assert any("_METIS_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_the_doctor_looks_at_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(_EXTRAS) == set(extras) - {"all", "docs", "dev"}


NAMES = re.compile(r"[\s\"'`]--[a-z]|langgraph-metis\[|`metis |: metis ")
"""In files that name an option, an extra or a command."""


def said() -> Iterator[tuple[str, str]]:
    """Where, and each text of the package that is no docstring, with `{}` for what is filled in."""
    for path in (ROOT / "metis_agent").rglob("*.py"):
        if not NAMES.search(source := path.read_text()):
            continue
        tree = ast.parse(source)
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                skipped |= set(map(id, node.values))
                parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                yield f"{path}:{node.lineno}", "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield f"{path}:{node.lineno}", node.value


def test_what_a_remedy_names_is_there() -> None:
    found = {
        words: {name for it in each.params for name in it.opts + it.secondary_opts}
        for words, each in commands().items()
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = set().union(*found.values(), {"--help", "--version", "--num_processes"})
    for place, text in said():
        if "--" not in text and "metis" not in text:
            continue
        for named in re.findall(r"langgraph-metis\[([\w,]+)\]", text):
            assert set(named.split(",")) <= set(extras), (place, text)
        for words, rest in re.findall(rf"metis ({'|'.join(sorted(found, reverse=True))})\b([^`\n]*)", text):
            assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", rest)) <= found[words] | {"--help"}, (place, text)
        if "sandboxes" not in place:  # which speak to other programs
            ours = re.sub(r"(pip|hf|ray) (install|uninstall|download|start) [^`]*", "", text)
            assert set(re.findall(r"(?<![\S])--[a-z][\w-]*", ours)) <= known, (place, text)


def commands() -> dict[str, Any]:
    """Every command and every group of them, by its words."""
    groups = {name: cli.command(name) for name in cli._COMMANDS}
    return {**{name: group for name, group in groups.items() if group.params}, **leaves()}
