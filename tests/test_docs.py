"""The README and the documentation are true: their Python runs and prints what they say, their commands exist, their
links lead somewhere, and the site builds without a warning.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from metis_agent import cli
from metis_agent.cli import app
from metis_agent.errors import MissingDependencyError
from tests.snippets import blocks, commands, snippets

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


ENOUGH = ROOT / "docs" / "how-to" / "enough.md"
"""Its commands run, with its Python, from top to bottom."""


@pytest.mark.timeout(600)
def test_a_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    found = blocks(ENOUGH)
    for (language, content, line), (after, printed, _) in zip(found, [*found[1:], ("", "", 0)], strict=True):
        said = io.StringIO()
        if language == "python":
            with contextlib.redirect_stdout(said):
                exec(compile("\n" * line + content, str(ENOUGH), "exec"), names)
            assert said.getvalue() == (printed if after == "text" else ""), f"{ENOUGH}:{line}"
        for command in content.splitlines() if language == "sh" else ():
            words = shlex.split(command)
            assert words.pop(0) == "metis"
            done = CliRunner().invoke(app, words, catch_exceptions=False)
            assert done.exit_code == 0, done.output


@pytest.mark.timeout(600)  # the first page to need torch imports it
@pytest.mark.parametrize("page", [page for page in DOCS if snippets(page) and page != ENOUGH], ids=named)
def test_the_python_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for snippet in snippets(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * snippet.line + snippet.code, str(page), "exec"), names)
        assert printed.getvalue().strip() == snippet.printed.strip(), f"{page}:{snippet.line}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_not_run_can_be_read(page: Path) -> None:
    for language, content, line in blocks(page):
        if language == "py":
            for node in ast.walk(ast.parse(content, f"{page}:{line}")):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metis_agent"):
                    assert_importable(str(node.module), [alias.name for alias in node.names])


def assert_importable(module: str, wanted: list[str]) -> None:
    try:
        found = importlib.import_module(module)
    except MissingDependencyError:
        return  # an extra that is not installed here
    for name in wanted:
        assert hasattr(found, name), f"{module}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        rest = list(words)
        if rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"metis {' '.join(words)}"
            command = cli.command(rest.pop(0))
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"metis {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, f"metis {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_within_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_symbols_files_and_tests_of_the_paper_exist() -> None:
    named_there = re.findall(r"`([\w./]+)`", (ROOT / "docs" / "paper.md").read_text())
    symbols = [name for name in named_there if name.startswith("metis_agent.")]
    files = [name for name in named_there if name.startswith("tests/")]
    files += re.findall(r"`(metis_agent/[\w./]+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(symbols) > 20
    for symbol in symbols:
        module, _, name = symbol.rpartition(".")
        assert hasattr(importlib.import_module(module), name), symbol
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_public_name_is_in_the_reference() -> None:
    import metis_agent

    pages = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    sections = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for name in set(metis_agent.__all__) - {"__version__"}:
        home = f"{getattr(metis_agent, name).__module__}"
        assert any(section in (home, f"{home}.{name}", f"metis_agent.{name}") for section in sections), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(DOCS)
    home = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(https?://(?:fonts|unpkg|cdn)[^"]*)"', home)
