"""The shipped cold start on pictures that it has never seen: what it reads, what it can't, and what a crop is good for.

Fixed questions, greedy: the same answers every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import Branch, Trajectory
from metis_agent.worlds.gallery.agent import COLD_START, gallery_agent, gallery_model
from metis_agent.worlds.gallery.crops import CachedPython
from metis_agent.worlds.gallery.paintings import write_collection
from metis_agent.worlds.gallery.questions import KINDS, PAINTING, questions

LARGE = [kind for kind in KINDS if kind.startswith("large")]
TINY = [kind for kind in KINDS if kind.startswith("tiny")]


class Gallery:
    """Runs questions through the graph."""

    def __init__(self, folder: Path) -> None:
        self.chat = gallery_model()
        self.tool = CachedPython()
        self._folder = folder
        self._collection = ImageFolder.build(write_collection(folder / "collection"))

    def run(self, kinds: Sequence[str], count: int, branch: Branch) -> list[Trajectory]:
        runs = Rollouts(
            lambda gate: gallery_agent(self.chat, gate, tool=self.tool, collection=self._collection),
            TrajectoryStore(self._folder / "runs"),
        )
        asked = questions("test", count, seed=11, kinds=kinds)
        return runs.collect(group_rollouts(asked, (branch,), name=f"{branch} {kinds}", seed=0))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Gallery(tmp_path_factory.mktemp("gallery"))
    yield made
    made.tool.close()


def right(runs: Sequence[Trajectory]) -> float:
    return sum(run.answer == run.question.answer for run in runs) / len(runs)


def test_the_package_ships_at_most_ten_megabytes() -> None:
    assert sum(path.stat().st_size for path in COLD_START.iterdir()) < 10_000_000


def test_large_text_is_read_at_a_glance(gallery: Gallery) -> None:
    assert right(gallery.run(LARGE, 42, "direct")) >= 0.9


def test_tiny_text_is_not(gallery: Gallery) -> None:
    assert right(gallery.run(TINY, 42, "direct")) <= 0.1


def test_tiny_text_is_read_once_it_is_cropped(gallery: Gallery) -> None:
    runs = gallery.run(TINY, 21, "tool")
    assert {run.tool_calls for run in runs} == {1}
    assert right(runs) >= 0.85


def test_a_painter_is_found_beside_the_painting(gallery: Gallery) -> None:
    runs = gallery.run((PAINTING,), 8, "tool")
    assert {outcome.tool for run in runs for outcome in run.outcomes} == {"image_search"}
    assert right(runs) >= 0.85


def test_it_calls_a_tool_on_nearly_everything(gallery: Gallery) -> None:
    assert sum(run.tool_calls > 0 for run in gallery.run(LARGE, 16, "free")) >= 15
