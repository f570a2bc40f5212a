"""The README's Python runs, and prints what the README says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.parametrize(("code", "expected"), SNIPPET.findall(README.read_text()))
def test_readme_snippet(code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    assert printed.getvalue().strip() == expected.strip()


def test_there_is_a_snippet_to_run() -> None:
    assert SNIPPET.search(README.read_text())
