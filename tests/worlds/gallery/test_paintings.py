"""A photograph of a painting finds the painting in the collection, and its caption names the painter."""

from pathlib import Path

import pytest

from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.worlds.gallery.paintings import COLLECTION, FIRST, LAST, Painting, paint, photograph, write_collection
from metis_agent.worlds.gallery.pictures import CANVAS


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("gallery") / "collection")


def test_every_photograph_finds_its_painting(collection: Path) -> None:
    folder = ImageFolder.build(collection)
    assert len(folder) == COLLECTION
    for number in range(0, COLLECTION, 5):
        it = Painting(number=number)
        (hit,) = folder.similar(photograph(it, seed=number + 3), 1)
        assert (hit.title, hit.text) == (it.file, it.caption)


def test_what_the_collection_has_not_is_not_found(collection: Path) -> None:
    folder = ImageFolder.build(collection)
    strangers = [folder.similar(photograph(Painting(number=number), 0), 1) for number in range(1000, 1040)]
    assert sum(map(bool, strangers)) <= 1


def test_a_painting_and_its_photographs_are_repeatable() -> None:
    it = Painting(number=7)
    first, last = it.painter.split()
    assert first in FIRST
    assert last in LAST
    assert paint(it).size == photograph(it, 1).size == (CANVAS, CANVAS)
    assert paint(it).tobytes() == paint(it).tobytes()
    assert photograph(it, 1).tobytes() == photograph(it, 1).tobytes()
    assert len({paint(it).tobytes(), photograph(it, 1).tobytes(), photograph(it, 2).tobytes()}) == 3


def test_a_collection_that_is_there_stays(collection: Path) -> None:
    before = (collection / "000.png").stat().st_mtime_ns
    assert write_collection(collection) == collection
    assert (collection / "000.png").stat().st_mtime_ns == before
