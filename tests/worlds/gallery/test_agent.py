"""The gallery's agent crops and searches, and the same crop of the same picture is made once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import ToolMessage

from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts, question_message
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import Branch, Trajectory
from metis_agent.worlds.gallery.experiment import COLD_START, CachedPython, gallery_agent, gallery_model
from metis_agent.worlds.gallery.questions import KINDS, PAINTING, questions, write_collection
from metis_agent.worlds.gallery.tokens import crop_code

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


def call(tool: PythonTool, code: str, messages: list[Any], number: int) -> ToolMessage:
    arguments = {"code": code, "messages": messages}
    answer: ToolMessage = tool.invoke(
        {"name": "python", "args": arguments, "id": f"call {number}", "type": "tool_call"}
    )
    return answer


def test_a_call_is_made_once_for_each_code_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    plain = PythonTool._execute

    def counted(self: PythonTool, code: str, *rest: Any) -> Any:
        runs.append(code)
        return plain(self, code, *rest)

    monkeypatch.setattr(PythonTool, "_execute", counted)
    one, other = (([question_message(question)]) for question in questions("test", 2))
    tool, stock = CachedPython(), PythonTool()
    try:
        first, again = (call(tool, crop_code((1, 1)), one, number) for number in (1, 2))
        assert len(runs) == 1
        assert first.content == again.content
        assert (first.tool_call_id, again.tool_call_id) == ("call 1", "call 2")
        assert call(tool, crop_code((1, 1)), other, 3).content != first.content
        assert call(tool, crop_code((2, 1)), one, 4).content != first.content
        assert len(runs) == 3
        assert call(stock, crop_code((1, 1)), one, 5).content == first.content
        failed = call(tool, "image_7.size", one, 6)
        assert failed.status == "error"
        assert call(tool, "image_7.size", one, 7).status == "error"
    finally:
        tool.close()
        stock.close()
