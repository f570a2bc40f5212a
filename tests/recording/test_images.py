"""Images leave a record for the image store and come back to the byte, whatever form they have; all else stays."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from metis_agent.recording import schema
from metis_agent.recording.images import ImageStore
from metis_agent.recording.set_aside import put_back, set_aside
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question, Trajectory

PIXELS = b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(2000)
ENCODED = base64.b64encode(PIXELS).decode()
URI = f"data:image/png;base64,{ENCODED}"
DIGEST = hashlib.sha256(PIXELS).hexdigest()


@dataclass
class Shown:
    base64: str
    mime_type: str
    width: int = 8


def run_with(*blocks: Any, artifact: Any = None, **metadata: Any) -> Trajectory:
    message = {"type": "tool", "data": {"content": list(blocks), "artifact": artifact}}
    return Trajectory(id="t", question=Question(id="q", text="?", metadata=metadata), messages=(message,))


BLOCKS: list[Any] = [
    {"type": "image", "base64": ENCODED, "mime_type": "image/png"},
    {"type": "image_url", "image_url": {"url": URI}},
    {"type": "image_url", "image_url": URI},
    {"type": "image", "url": URI},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}},
    {"base64": ENCODED, "mime_type": "image/png", "width": 3},
    Shown(ENCODED, "image/png"),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block)[:30])
def test_every_kind_of_block_is_set_aside_and_put_back(block: Any, tmp_path: Path) -> None:
    images = ImageStore(tmp_path)
    line = schema.dumps(run_with({"type": "text", "text": "see"}, block, artifact=block, images=[URI])).encode()
    short = set_aside(line, images.put_image)
    assert ENCODED.encode() not in short
    assert short.count(f'image:sha256:{DIGEST}"'.encode()) == 3
    assert images.get_image(f"sha256:{DIGEST}") == PIXELS
    assert put_back(short, lambda reference: base64.b64encode(images.get_image(reference))) == line


@pytest.mark.parametrize(
    "text",
    [
        "base64 is a way to write bytes",
        ENCODED[:-1] + "!",
        ENCODED[:-1],  # not whole: other bytes would come back
        ENCODED.rstrip("=") + "A===",
        base64.b64encode(b"no image at all" * 100).decode(),
        f"look at {URI}",
        f"data:audio/wav;base64,{ENCODED}",
        base64.b64encode(PIXELS[:50]).decode(),
        "image:sha256:" + "0" * 63,
    ],
)
def test_what_is_no_image_stays(text: str, tmp_path: Path) -> None:
    line = json.dumps({"base64": text}).encode()
    assert set_aside(line, ImageStore(tmp_path).put_image) == line
    assert put_back(line, lambda _: b"other") == line
    assert not (tmp_path / "images").exists()


def test_a_store_keeps_a_picture_once_and_gives_it_back(tmp_path: Path) -> None:
    run = run_with(*BLOCKS[:-1], images=[URI])
    with TrajectoryStore(tmp_path) as store:
        for _ in range(3):
            store.append(run)
        copy = pickle.loads(pickle.dumps(store))
        copy.append(run)
        copy.close()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [DIGEST]
    assert sum(len(path.read_bytes()) for path in tmp_path.glob("segment-*")) < 4 * 3000
    assert list(TrajectoryStore(tmp_path, read_only=True).read()) == [run] * 4
    (outcome, *_) = TrajectoryStore(tmp_path, read_only=True).read(whole=False)
    assert outcome.question == run.question


def test_a_picture_that_is_gone_leaves_its_reference(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TrajectoryStore(tmp_path) as store:
        for _ in range(2):
            store.append(run_with(images=[URI]))
    (tmp_path / "images" / DIGEST).unlink()
    runs = list(TrajectoryStore(tmp_path, read_only=True).read())
    assert [run.question.metadata["images"] for run in runs] == [[f"data:image/png;base64,image:sha256:{DIGEST}"]] * 2
    assert caplog.text.count("is not put back") == 1


def test_a_record_whose_picture_cannot_be_kept_is_not_written(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path)
    (tmp_path / "images").write_text("in the way")
    with pytest.raises(Exception, match="images"):
        store.append(run_with(images=[URI]))
    assert store.count() == 0
    store.append(run_with())
    assert store.count() == 1


def test_what_was_recorded_with_references_reads_as_it_is(tmp_path: Path) -> None:
    reference = ImageStore(tmp_path).put_image(PIXELS)
    run = run_with({"type": "image", "url": reference}, images=[reference])
    with TrajectoryStore(tmp_path) as store:
        store.append(run)
    assert list(store.read()) == [run]


def test_a_store_on_another_file_system_keeps_pictures_too() -> None:
    with TrajectoryStore("memory://pictures/runs") as store:
        store.append(run_with(images=[URI]))
    (run,) = TrajectoryStore("memory://pictures/runs", read_only=True).read()
    assert run.question.metadata["images"] == [URI]
