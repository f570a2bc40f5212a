"""The public names keep their signatures, or somebody's code breaks."""

from __future__ import annotations

import difflib

import pytest

from tests.public_api import FROZEN, described

pytest.importorskip("langchain")
pytest.importorskip("trl")


def test_the_public_api_is_the_frozen_one() -> None:
    before, now = FROZEN.read_text().splitlines(), described().splitlines()
    changed = list(difflib.unified_diff(before, now, "frozen", "now", lineterm="", n=2))
    assert not changed, (
        "the public API has changed; if that is meant, say so in CHANGELOG.md and run: python -m tests.public_api\n"
        + "\n".join(changed)
    )
