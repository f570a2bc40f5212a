"""Images leave a trajectory for the image store, whatever form they have; what is no image stays as it is."""

from __future__ import annotations

import base64
import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from metis_agent.recording.images import ImageStore
from metis_agent.recording.set_aside import PictureStore, set_aside
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question, Trajectory

PIXELS = b"\x89PNG\r\n\x1a\n and so on"
ENCODED = base64.b64encode(PIXELS).decode()
URI = f"data:image/png;base64,{ENCODED}"
REFERENCE = "sha256:" + hashlib.sha256(PIXELS).hexdigest()


@dataclass
class Shown:
    base64: str
    mime_type: str
    width: int = 8


@dataclass
class Execution:
    images: tuple[Shown, ...]
    stdout: str = "text"


def run_with(*blocks: Any, artifact: Any = None, **metadata: Any) -> Trajectory:
    message = {"type": "tool", "data": {"content": list(blocks), "artifact": artifact}}
    return Trajectory(id="t", question=Question(id="q", text="?", metadata=metadata), messages=(message,))


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": ENCODED, "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
        {"type": "image", "url": URI},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}},
        {"base64": ENCODED, "mime_type": "image/png", "width": 3},
    ],
)
def test_every_kind_of_block_becomes_a_reference(block: dict[str, Any], tmp_path: Path) -> None:
    images = ImageStore(tmp_path)
    kept = set_aside(run_with({"type": "text", "text": "see"}, block), images)
    assert kept.messages[0]["data"]["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image", "url": REFERENCE},
    ]
    assert images.get_image(REFERENCE) == PIXELS


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "not base64!", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "image", "url": "data:image/png;base64,%%%"},
        {"type": "image", "base64": "", "mime_type": "image/png"},
        {"type": "image", "file_id": "f-1"},
        {"type": "image_url", "image_url": 7},
        {"type": "text", "text": f"look at {URI}"},
        {"type": "audio", "base64": ENCODED, "mime_type": "audio/wav"},
    ],
)
def test_what_is_no_image_in_the_record_stays(block: dict[str, Any], tmp_path: Path) -> None:
    assert set_aside(run_with(block), ImageStore(tmp_path)).messages[0]["data"]["content"] == [block]
    assert not (tmp_path / "images").exists() or not list((tmp_path / "images").iterdir())


def test_the_question_and_what_a_tool_left_beside_its_message(tmp_path: Path) -> None:
    run = run_with(artifact=Execution(images=(Shown(ENCODED, "image/png"),)), images=[URI], options={"A": "red"})
    kept = set_aside(run, ImageStore(tmp_path))
    assert kept.question.metadata == {"images": [REFERENCE], "options": {"A": "red"}}
    artifact = kept.messages[0]["data"]["artifact"]
    assert artifact == {"images": [{"type": "image", "url": REFERENCE}], "stdout": "text"}
    assert run.question.metadata["images"] == [URI]  # the run itself is left as it was


def test_a_store_keeps_a_picture_once(tmp_path: Path) -> None:
    with PictureStore(tmp_path) as store:
        for _ in range(3):
            store.append(run_with({"type": "image", "url": URI}, images=[URI]))
        copy = pickle.loads(pickle.dumps(store))
        copy.append(run_with(images=[URI]))
        copy.close()
    runs = list(TrajectoryStore(tmp_path, read_only=True).read())
    assert [run.question.metadata["images"] for run in runs] == [[REFERENCE]] * 4
    assert [path.name for path in (tmp_path / "images").iterdir()] == [REFERENCE.removeprefix("sha256:")]
