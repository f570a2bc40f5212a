import json
import random
from io import BytesIO

import pytest
from PIL import Image, PngImagePlugin

from metis_agent.errors import ConfigurationError, StorageError, ToolError
from metis_agent.tools.images import load_image
from metis_agent.tools.search import ImageSearchBackend, SimilarImageBackend
from metis_agent.tools.search import image_folder as module
from metis_agent.tools.search.image_folder import ImageFolder


def picture(seed, size=(300, 200)):
    small = Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    (root / "trip").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010E] = "A <b>lighthouse</b> at dusk"
    exif[0x9C9E] = "Küste;Leuchtturm".encode("utf-16-le") + b"\0\0"
    picture(1).save(root / "trip" / "IMG_0001.jpg", exif=exif)
    (root / "trip" / "IMG_0001.txt").write_text("東京タワーの夜景")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Description", "two sailing boats")
    picture(2).save(root / "red_bicycle.png", pnginfo=notes)
    (root / "red_bicycle.json").write_text('{"caption": "against a wall", "tags": ["old", 3, null]}')
    picture(3).save(root / "plain.webp")
    lines = [{"file_name": "plain.webp", "text": "a bowl of soup"}, "no object", {"file_name": 3}]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (root / "script.svg").write_text("<svg/>")
    (root / "vector.png").write_text("<svg/>")
    return root


def names(hits):
    return [hit.image for hit in hits]


def test_it_is_both_kinds_of_backend(folder):
    found = ImageFolder.build(folder)
    assert isinstance(found, ImageSearchBackend)
    assert isinstance(found, SimilarImageBackend)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("lighthouse", "trip/IMG_0001.jpg"),  # EXIF
        ("leuchtturm", "trip/IMG_0001.jpg"),  # Windows keywords
        ("東京", "trip/IMG_0001.jpg"),  # a text beside it
        ("夜景", "trip/IMG_0001.jpg"),
        ("trip", "trip/IMG_0001.jpg"),  # the folder's name
        ("bicycle", "red_bicycle.png"),  # the file's name
        ("sailing", "red_bicycle.png"),  # a PNG text
        ("wall", "red_bicycle.png"),  # JSON beside it
        ("soup", "plain.webp"),  # metadata.jsonl
    ],
)
def test_words_find_what_is_written(folder, query, name):
    assert names(ImageFolder.build(folder).search(query, 5)) == [name]


def test_a_hit(folder):
    (hit,) = ImageFolder.build(folder).search("lighthouse", 1)
    assert hit.text == "東京タワーの夜景 A lighthouse at dusk Küste;Leuchtturm"
    assert (hit.width, hit.height, hit.source) == (300, 200, "trip/IMG_0001.jpg")
    assert load_image(hit.thumbnail).size == (256, 171)


def test_words_that_nothing_matches(folder):
    found = ImageFolder.build(folder)
    assert found.search("zebra", 5) == found.search("", 5) == found.search("bicycle", 0) == []
    assert found.search('"NEAR( OR * bicycle', 5)


@pytest.mark.parametrize("size", [(150, 100), (900, 600), (80, 53)])
def test_a_scaled_copy_finds_its_original(folder, size):
    file = BytesIO()
    picture(2, size).save(file, "JPEG", quality=50)
    (hit,) = ImageFolder.build(folder).similar(load_image(file.getvalue()), 5)
    assert hit.image == "red_bicycle.png"
    assert hit.score > 0.9


def test_another_image_finds_nothing(folder):
    assert ImageFolder.build(folder).similar(picture(99), 5) == []
    assert len(ImageFolder.build(folder, likeness=0.01).similar(picture(99), 2)) <= 2


def test_the_index_saves_reading_the_images_again(folder, tmp_path, monkeypatch):
    index = tmp_path / "deep" / "index.jsonl"
    first = ImageFolder.build(folder, index=index)
    (folder / "red_bicycle.json").write_text('{"caption": "in the rain"}')  # captions are always read
    picture(4).save(folder / "new.png")
    (folder / "plain.webp").unlink()
    read = []
    monkeypatch.setattr(module, "load_image", lambda source, *rest: read.append(source.name) or load_image(source))
    second = ImageFolder.build(folder, index=index)
    assert read == ["new.png"]
    assert names(second.search("rain", 5)) == ["red_bicycle.png"]
    assert names(second.similar(picture(1), 5)) == names(first.similar(picture(1), 5)) == ["trip/IMG_0001.jpg"]
    assert second.search("soup", 5) == []
    third = ImageFolder.build(folder, index=index)
    assert third._records == second._records
    assert [path.name for path in index.parent.iterdir()] == ["index.jsonl"]


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"metis": "other"}', '{"metis": "image folder"}'])
def test_a_foreign_index_is_not_written_over(folder, tmp_path, content):
    index = tmp_path / "index.jsonl"
    index.write_text(content)
    with pytest.raises(ConfigurationError, match="something else, or damaged"):
        ImageFolder.build(folder, index=index)
    assert index.read_text() == content


def test_an_index_that_can_not_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        ImageFolder.build(folder, index=tmp_path / "file" / "index.jsonl")


def test_a_file_that_went_away_is_still_a_hit(folder):
    found = ImageFolder.build(folder)
    (folder / "red_bicycle.png").unlink()
    (hit,) = found.search("bicycle", 1)
    assert hit.thumbnail == ""


class Colours:
    """An "image model" whose space is colour."""

    name = "colours-1"
    words = {"reddish": [1.0, 0.0, 0.0], "blueish": [0.0, 0.0, 1.0], "nothing": [0.0, 0.0, 0.0]}  # noqa: RUF012

    def embed_images(self, images):
        return [[float(value) for value in image.resize((1, 1)).tobytes()[:3]] for image in images]

    def embed_text(self, text):
        return self.words.get(text, [1.0, 1.0, 1.0])


def test_with_a_model_likeness_is_of_meaning(tmp_path):
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{colour}.png")
    index = tmp_path / "index.jsonl"
    for _ in range(2):
        found = ImageFolder.build(tmp_path, embedder=Colours(), index=index)
        assert names(found.search("reddish", 1)) == ["red.png"]  # nobody described it so
        assert names(found.search("green", 2))[0] == "green.png"  # what is described comes first
        assert names(found.similar(Image.new("RGB", (2, 2), (10, 10, 200)), 1)) == ["blue.png"]
        with pytest.raises(ToolError, match="no usable embedding"):
            found.search("nothing", 3)
    assert len(ImageFolder.build(tmp_path, index=index)) == 3  # made by another model, so read anew


def test_settings_are_checked(tmp_path):
    with pytest.raises(ConfigurationError, match="no folder"):
        ImageFolder.build(tmp_path / "missing")
    for likeness in (0.0, -1.0, 1.1):
        with pytest.raises(ConfigurationError, match="likeness"):
            ImageFolder.build(tmp_path, likeness=likeness)
    assert ImageFolder.build(tmp_path).search("x", 1) == []
