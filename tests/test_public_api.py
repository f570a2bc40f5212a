"""The public names keep their signatures, or somebody's code breaks."""

from __future__ import annotations

import difflib
import importlib
import json
import re
from pathlib import Path

import pytest

from tests.public_api import FROZEN, MODULES, described

pytest.importorskip("langchain")
pytest.importorskip("trl")


def test_the_public_api_is_the_frozen_one() -> None:
    before, now = FROZEN.read_text().splitlines(), described().splitlines()
    changed = list(difflib.unified_diff(before, now, "frozen", "now", lineterm="", n=2))
    assert not changed, (
        "the public API has changed; if that is meant, say so in CHANGELOG.md and run: python -m tests.public_api\n"
        + "\n".join(changed)
    )


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.ipynb"), *ROOT.glob("examples/*.py")]
# The formulas, the worlds that the examples play in, and a plug-in: shown, not promised.
SHOWN = re.compile(r"metis_agent\.(hdpo\.advantages|worlds\.[\w.]+|engines\.verl)")
IMPORT = re.compile(r"from (metis_agent[\w.]*) import ([\w, ]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_is_public(page: Path) -> None:
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    for module, names in IMPORT.findall(text):
        if not SHOWN.fullmatch(module):
            assert module in MODULES or module == "metis_agent", f"{module} is private"
            assert {name.strip() for name in names.split(",")} <= set(importlib.import_module(module).__all__)
