import hashlib
import os
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from metis_agent.errors import InputError, StorageError
from metis_agent.recording import ImageStore

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
DIGEST = hashlib.sha256(PNG).hexdigest()


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "runs") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_an_image_comes_back_by_its_hash(url):
    reference = ImageStore(url).put_image(PNG)
    assert reference == f"sha256:{DIGEST}"
    assert ImageStore(url).get_image(reference) == PNG


def test_the_same_image_is_one_file(tmp_path):
    images = ImageStore(tmp_path)
    first = images.put_image(PNG)
    before = os.stat(tmp_path / "images" / DIGEST)
    assert images.put_image(PNG) == first
    assert os.stat(tmp_path / "images" / DIGEST).st_ino == before.st_ino  # not written again
    assert os.listdir(tmp_path / "images") == [DIGEST]


def test_many_writers_of_one_image_leave_one_whole_file(tmp_path):
    content = PNG * 4000
    with ThreadPoolExecutor(8) as pool:
        references = set(pool.map(lambda _: ImageStore(tmp_path).put_image(content), range(32)))
    assert len(references) == 1
    assert len(os.listdir(tmp_path / "images")) == 1
    assert ImageStore(tmp_path).get_image(references.pop()) == content


def test_half_a_file_is_found_out_and_mended(tmp_path):
    images = ImageStore(tmp_path)
    reference = images.put_image(PNG)
    (tmp_path / "images" / DIGEST).write_bytes(PNG[:10])
    with pytest.raises(StorageError, match="damaged"):
        images.get_image(reference)
    images.put_image(PNG)
    assert images.get_image(reference) == PNG


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        ImageStore(tmp_path).put_image(PNG)
    assert os.listdir(tmp_path / "images") == []


def test_a_missing_image_is_a_storage_error(url):
    with pytest.raises(StorageError, match=DIGEST):
        ImageStore(url).get_image(f"sha256:{DIGEST}")


@pytest.mark.parametrize("reference", ["", "sha256:", "sha256:../../etc/passwd", f"md5:{DIGEST}", DIGEST])
def test_what_is_no_reference_is_refused(tmp_path, reference):
    with pytest.raises(InputError, match="put_image"):
        ImageStore(tmp_path).get_image(reference)
