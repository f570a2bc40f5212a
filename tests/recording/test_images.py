"""Images leave a record for the image store and come back to the byte, whatever form they have; all else stays."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from metis_agent.errors import InputError, StorageError
from metis_agent.recording import schema
from metis_agent.recording.images import ImageStore, RestoreImages, externalise_images
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


def restored(line: bytes, images: ImageStore) -> Any:
    return RestoreImages(lambda reference: base64.b64encode(images.get_image(reference)).decode())(json.loads(line))


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
    short = externalise_images(line, images.put_image)
    assert ENCODED.encode() not in short
    assert short.count(f'image:sha256:{DIGEST}"'.encode()) == 3
    assert images.get_image(f"sha256:{DIGEST}") == PIXELS
    assert restored(short, images) == json.loads(line)


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
    assert externalise_images(line, ImageStore(tmp_path).put_image) == line
    assert RestoreImages(lambda _: "other")(json.loads(line)) == {"base64": text}
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


REFERENCE = f"image:sha256:{DIGEST}"
LIKE_REFERENCES = [
    REFERENCE, f"image:text:sha256:{DIGEST}", f"image:text:text:sha256:{DIGEST}", f"data:image/png;base64,{REFERENCE}",
    f"data:image/png;base64,image:text:sha256:{DIGEST}", f'say "{REFERENCE}', f'"{REFERENCE}"', f"\\{REFERENCE}",
    f'\\"{REFERENCE}', f" {REFERENCE}", REFERENCE * 2, "image:text:", f'see "{ENCODED}', f"image:sha256:{'0' * 64}",
]  # fmt: skip


@pytest.mark.parametrize("text", LIKE_REFERENCES)
def test_a_text_that_looks_like_a_reference_is_text(text: str, tmp_path: Path) -> None:
    run = replace(run_with({"type": "text", "text": text}, BLOCKS[0], **{text: [text], "images": [URI]}), id=text)
    run = replace(run, answer=text, question=replace(run.question, text=text))
    with TrajectoryStore(tmp_path) as store:
        store.append(run)
    assert list(store.read()) == [run]
    assert store.ids() == {text}
    assert [again.question for again in store.read(whole=False)] == [run.question]


def test_an_image_named_a_million_times_is_one_text(tmp_path: Path) -> None:
    large = b"\x89PNG\r\n\x1a\n" + bytes(300_000)
    reference = "image:" + ImageStore(tmp_path).put_image(large)
    for times, good in ((1_000, 1), (2_000, 0)):
        line = schema.dumps(Trajectory(id="t", question=Question(id="q", text="?", metadata={"all": ["@"] * times})))
        (tmp_path / "segment-1.jsonl").write_text(line.replace("@", reference) + "\n")
        store = TrajectoryStore(tmp_path, read_only=True)
        tracemalloc.start()
        read = list(store.read(whole=False))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(read), store.report.corrupt) == (good, 1 - good)
        assert peak < 8_000_000
        assert not read or len(read[0].question.metadata["all"][-1]) > 400_000


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metis_agent.recording.store.MOST_RESTORED", 10_000)
    monkeypatch.setattr("metis_agent.recording.store._MAX_LINE", 5_000)
    store = TrajectoryStore(tmp_path)
    store.append(run_with(images=[URI] * 3))
    with pytest.raises(InputError, match="10000 with its images"):
        store.append(run_with(images=[URI] * 4))
    assert store.count() == 1


# --- the store of images ----------------------------------------------------------------------------------------------


def test_an_image_comes_back_by_its_hash(url: str) -> None:
    reference = ImageStore(url).put_image(PIXELS)
    assert reference == f"sha256:{DIGEST}"
    assert ImageStore(url).get_image(reference) == PIXELS


def test_the_same_image_is_one_file(tmp_path: Path) -> None:
    images = ImageStore(tmp_path)
    first = images.put_image(PIXELS)
    before = os.stat(tmp_path / "images" / DIGEST)
    assert images.put_image(PIXELS) == first
    assert os.stat(tmp_path / "images" / DIGEST).st_ino == before.st_ino  # not written again
    assert os.listdir(tmp_path / "images") == [DIGEST]


def test_many_writers_of_one_image_leave_one_whole_file(tmp_path: Path) -> None:
    content = PIXELS * 4000
    with ThreadPoolExecutor(8) as pool:
        references = set(pool.map(lambda _: ImageStore(tmp_path).put_image(content), range(32)))
    assert len(references) == 1
    assert len(os.listdir(tmp_path / "images")) == 1
    assert ImageStore(tmp_path).get_image(references.pop()) == content


def test_half_a_file_is_found_out_and_mended(tmp_path: Path) -> None:
    images = ImageStore(tmp_path)
    reference = images.put_image(PIXELS)
    (tmp_path / "images" / DIGEST).write_bytes(PIXELS[:10])
    with pytest.raises(StorageError, match="damaged"):
        images.get_image(reference)
    images.put_image(PIXELS)
    assert images.get_image(reference) == PIXELS


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        ImageStore(tmp_path).put_image(PIXELS)
    assert os.listdir(tmp_path / "images") == []


def test_a_missing_image_is_a_storage_error(url: str) -> None:
    with pytest.raises(StorageError, match=DIGEST):
        ImageStore(url).get_image(f"sha256:{DIGEST}")


@pytest.mark.parametrize("reference", ["", "sha256:", "sha256:../../etc/passwd", f"md5:{DIGEST}", DIGEST])
def test_what_is_no_reference_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(InputError, match="put_image"):
        ImageStore(tmp_path).get_image(reference)
