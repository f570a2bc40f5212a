"""Pictures of a data set: left as they are where a model can take them so, written anew where not, refused where no
picture is there."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from metis_agent.errors import InfrastructureError, InputError
from metis_agent.evaluation.benchmarks import benchmark_named
from metis_agent.evaluation.benchmarks.base import open_rows
from metis_agent.tools.images import ImageRules, SendableImage, load_image, sendable_image
from tests.evaluation.benchmarks import copies
from tests.hostile_images import HOSTILE, ODD


def content_of(picture: SendableImage) -> bytes:
    return base64.b64decode(picture.uri.partition(",")[2])


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_still_upright_picture_stays_as_it_is(kind: str) -> None:
    content = copies.picture("red", kind=kind)
    picture = sendable_image(content)
    assert picture == SendableImage(uri=f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}")


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_what_is_hostile_is_refused(name: str) -> None:
    with pytest.raises(InputError):
        sendable_image(HOSTILE[name](), ImageRules())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # which is all that Pillow has to say of it
@pytest.mark.parametrize("name", sorted(ODD))
def test_what_is_odd_can_be_asked_about(name: str) -> None:
    content, size = ODD[name]()
    picture = sendable_image(content)
    assert load_image(picture.uri).size == size
    # Whatever a service makes of animations and of EXIF, it meets neither.
    with Image.open(BytesIO(content_of(picture))) as image:
        assert getattr(image, "n_frames", 1) == 1
        assert image.getexif().get(0x0112) in (None, 1)


def test_a_photograph_beyond_what_the_agent_reads_is_shrunk_and_says_so() -> None:
    picture = sendable_image(file_of(Image.new("L", (8000, 6000), 90), "PNG"))
    assert picture.shrunk
    width, height = load_image(picture.uri).size
    assert 39_000_000 < width * height <= 40_000_000
    assert width / height == pytest.approx(4 / 3, abs=1e-3)


def test_the_bomb_stays_a_bomb() -> None:
    with pytest.raises(InputError, match=r"more than 89,000,000 pixels|at most 89,000,000"):
        sendable_image(file_of(Image.new("1", (13_000, 13_000)), "PNG"))


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["vstar", "hrbench", "wemath", "mathvista"])
def test_rows_come_without_pictures_and_pictures_as_their_bytes(name: str, tmp_path: Path) -> None:
    source = benchmark_named(name).source
    rows = open_rows(source, getattr(copies, name)(tmp_path / "copy"))
    found = list(rows)
    assert len(found) == len(rows) > 0
    assert all(source.images not in row for row in found)
    for number in range(len(rows)):
        assert load_image(rows.picture(number)).size == (64, 48)
    assert rows.digest() == open_rows(source, tmp_path / "copy").digest()
    with pytest.raises(InputError, match="there is no row"):
        rows.picture(len(rows))


@pytest.mark.usefixtures("cached")
def test_a_bomb_in_a_column_of_images_is_not_decoded_by_datasets(tmp_path: Path) -> None:
    """`datasets` would decode it to 5 GB on its own, as soon as the row is read."""
    data = copies.wemath(tmp_path / "copy")
    path = next((data / "data").iterdir())
    rows = datasets.Dataset.from_parquet(str(path)).cast_column("image_path", datasets.Image(decode=False)).to_list()
    rows[0]["image_path"] = {"bytes": HOSTILE["bomb"](), "path": None}
    datasets.Dataset.from_list(rows).cast_column("image_path", datasets.Image()).to_parquet(path)
    opened = open_rows(benchmark_named("wemath").source, data)
    assert len(list(opened)) == 10
    with pytest.raises(InputError, match="pixels"):
        sendable_image(opened.picture(0))


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("../../secret.png", "outside of the data set"),
        ("/etc/passwd", "outside of the data set"),
        ("a\\..\\b.png", "outside of the data set"),
        ("direct_attributes", "can't be read"),
        ("direct_attributes/none.png", "can't be read"),
        ("x" * 5000, "can't be read"),
    ],
)
def test_a_row_names_no_file_but_those_beside_it(image: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(copies.picture("red"))
    data = copies.vstar(tmp_path / "a" / "copy")
    lines = [json.loads(line) for line in (data / "test_questions.jsonl").read_text().splitlines()]
    (data / "test_questions.jsonl").write_text(json.dumps({**lines[0], "image": image}) + "\n")
    with pytest.raises(InputError, match=reason):
        open_rows(benchmark_named("vstar").source, data).picture(0)


@pytest.mark.usefixtures("cached")
def test_a_file_that_is_no_such_data_set(tmp_path: Path) -> None:
    source = benchmark_named("vstar").source
    (tmp_path / "test_questions.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(InputError, match=r"has the columns \['a'\] and no 'image'"):
        open_rows(source, tmp_path)
    (tmp_path / "test_questions.jsonl").write_bytes(b"\x00\xff no JSON")
    with pytest.raises(InputError, match="can't be read"):
        open_rows(source, tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        open_rows(source, tmp_path / "nowhere")


def test_without_a_copy_and_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InfrastructureError, match=r"'craigwu/vstar_bench' can't be fetched.*name the folder with --data"
    ):
        open_rows(benchmark_named("vstar").source)
