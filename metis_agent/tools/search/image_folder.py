"""A folder of images, found by words (what is written in them and beside them) or by likeness.

Words go to the embedded full-text index, likeness to fingerprints: near duplicates are found, not crops. With
an `ImageEmbedder` likeness is of meaning, and words also find images without a description.

Written in a file: EXIF, PNG and JPEG comments. Beside it: `cat.txt` or `cat.json` next to `cat.jpg`, and lines
`{"file_name": "cat.jpg", ...}` of a `metadata.jsonl` in its folder, as Hugging Face's image folders have. Of JSON, all
strings are taken.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from metis_agent.errors import ConfigurationError, InputError, StorageError, ToolError
from metis_agent.formats import atomic_path
from metis_agent.tools.images import ImageRules, load_image, thumbnail
from metis_agent.tools.search.base import ImageEmbedder, ImageHit, plain_text
from metis_agent.tools.search.corpus import CorpusSearch
from metis_agent.tools.search.documents import Document
from metis_agent.tools.search.likeness import Fingerprint, fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageFolder", "ImageRecord", "captions_of", "notes_in", "notes_of"]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif"})
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """What the index holds of one file."""

    name: str
    """Its path within the folder, with forward slashes."""
    stamp: tuple[int, int]
    """Size in bytes and time of the last change in nanoseconds: with another stamp it is read anew."""
    width: int
    height: int
    fingerprint: Fingerprint
    notes: str = ""
    vector: tuple[float, ...] = ()
    """Its embedding, of length 1; empty without an embedder."""


class ImageFolder:
    """Searches the images of a folder, from any number of threads; made by `build`."""

    def __init__(
        self, folder: Path, records: Sequence[ImageRecord], *, embedder: ImageEmbedder | None, likeness: float
    ) -> None:
        if not 0.0 < likeness <= 1.0:
            raise ConfigurationError(f"likeness={likeness!r}: it must be more than 0 and at most 1, such as 0.85.")
        self._folder = folder
        self._records = {record.name: record for record in records}
        self._embedder = embedder
        self._likeness = likeness
        self._words = CorpusSearch.build(
            Document(id=record.name, title=record.name, text=record.notes) for record in records
        )

    @classmethod
    def build(
        cls,
        folder: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        embedder: ImageEmbedder | None = None,
        likeness: float = 0.85,
        rules: ImageRules | None = None,
    ) -> Self:
        """Read the images of a folder and below; files that are no usable images are left out.

        Args:
            folder: where the images are.
            index: a JSONL file to keep what was read in; then only new and changed files are read.
            embedder: a model for likeness in meaning; without one, fingerprints tell near duplicates.
            likeness: how alike an image must be, by fingerprint, to be found; 1.0 is the same.
            rules: which images are loaded.

        Raises:
            ConfigurationError: there is no such folder, the index is a file of something else, or `likeness` is
                out of range.
            MissingDependencyError: Pillow is not installed.
            StorageError: the index can't be read or written.
        """
        root = Path(folder)
        if not root.is_dir():
            raise ConfigurationError(f"no folder at {str(root)!r}; name one that holds images.")
        model = "" if embedder is None else embedder.name
        known = {} if index is None else _read_index(Path(index), model)
        records = list(_scan(root, known, embedder, rules or ImageRules()))
        if index is not None and {record.name: record for record in records} != known:
            _write_index(Path(index), model, records)
        return cls(root, records, embedder=embedder, likeness=likeness)

    def search(self, query: str, limit: int) -> list[ImageHit]:
        """Return at most `limit` images for words: first those that are described by them, then by meaning."""
        scores = {hit.source: hit.score for hit in self._words.search(query, limit)}
        if self._embedder is not None and query.strip() and len(scores) < limit:
            nearest = self._nearest(_unit(self._embedder.embed_text(query)))
            scores |= {name: score for name, score in nearest[: limit + len(scores)] if name not in scores}
        return self._hits(list(scores.items())[: max(0, limit)])

    def similar(self, image: Image, limit: int) -> list[ImageHit]:
        """Return at most `limit` images like this one: near duplicates, or by meaning with an embedder."""
        if self._embedder is not None:
            return self._hits(self._nearest(_unit(self._embedder.embed_images([image])[0]))[: max(0, limit)])
        wanted = fingerprint(image)
        scored = [(record.name, record.fingerprint.likeness(wanted)) for record in self._records.values()]
        found = [(name, score) for name, score in scored if score >= self._likeness]
        return self._hits(sorted(found, key=lambda item: (-item[1], item[0]))[: max(0, limit)])

    def __len__(self) -> int:
        return len(self._records)

    def _nearest(self, vector: Sequence[float]) -> list[tuple[str, float]]:
        """Return all names with their cosine, best first."""
        scored = [(record.name, sum(map(mul, record.vector, vector))) for record in self._records.values()]
        return sorted(scored, key=lambda item: (-item[1], item[0]))

    def _hits(self, scores: Iterable[tuple[str, float]]) -> list[ImageHit]:
        return [self._hit(self._records[name], score) for name, score in scores]

    def _hit(self, record: ImageRecord, score: float) -> ImageHit:
        # Only here are files opened: what the tool shows is a data URI, so that it never needs to open any.
        try:
            content, mime_type = thumbnail(load_image(self._folder / record.name))
            shown = f"data:{mime_type};base64,{base64.b64encode(content).decode()}"
        except InputError:  # gone or changed since the index was built
            shown = ""
        return ImageHit(
            title=record.name,
            text=record.notes,
            source=record.name,
            score=score,
            image=record.name,
            thumbnail=shown,
            width=record.width,
            height=record.height,
        )


def _scan(
    root: Path, known: dict[str, ImageRecord], embedder: ImageEmbedder | None, rules: ImageRules
) -> Iterable[ImageRecord]:
    captions: dict[Path, dict[str, str]] = {}
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() not in _SUFFIXES or not file.is_file():
            continue
        if file.parent not in captions:
            captions[file.parent] = captions_of(file.parent)
        try:
            yield _record(file, file.relative_to(root).as_posix(), known, captions[file.parent], embedder, rules)
        except (InputError, OSError):
            continue


def _record(
    file: Path,
    name: str,
    known: dict[str, ImageRecord],
    captions: dict[str, str],
    embedder: ImageEmbedder | None,
    rules: ImageRules,
) -> ImageRecord:
    status = file.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    notes = _notes(file, captions)  # a caption may change where the image does not
    if name in known and known[name].stamp == stamp:
        return replace(known[name], notes=notes)
    image = load_image(file, rules)
    return ImageRecord(
        name=name,
        stamp=stamp,
        width=image.width,
        height=image.height,
        fingerprint=fingerprint(image),
        notes=notes,
        vector=() if embedder is None else _unit(embedder.embed_images([image])[0]),
    )


def _notes(file: Path, captions: dict[str, str]) -> str:
    from PIL import Image as image_module

    try:
        with image_module.open(file, formats=["PNG", "JPEG", "WEBP", "GIF"]) as image:
            return notes_of(file, image, captions)
    except Exception as error:  # as in `load_image`
        raise InputError(f"{file.name!r} can't be read: {error}.") from error


def _unit(vector: Sequence[float]) -> tuple[float, ...]:
    length = sum(map(mul, vector, vector)) ** 0.5
    if not 0.0 < length < float("inf"):
        raise ToolError("the image model gave no usable embedding for this; try other words or another image.")
    return tuple(value / length for value in vector)


def _read_index(path: Path, model: str) -> dict[str, ImageRecord]:
    """Return the records of an index; none where there is no file, or another model made it."""
    if not path.exists():
        return {}
    try:
        head, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if head["metis"] != "image folder":
            raise ValueError("another kind of file")
        if head["format"] != _FORMAT or head["model"] != model:
            return {}
        records = [_restored(line) for line in lines]
    except OSError as error:
        raise StorageError(f"index {str(path)!r} can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"index {str(path)!r} is a file of something else, or damaged ({error!r}); name another path or remove it."
        ) from error
    return {record.name: record for record in records}


def _restored(line: dict[str, Any]) -> ImageRecord:
    print_ = line["fingerprint"]
    read = Fingerprint(bits=int(print_["bits"], 16), colour=tuple(print_["colour"]))
    return ImageRecord(**line | {"fingerprint": read, "stamp": tuple(line["stamp"]), "vector": tuple(line["vector"])})


def _write_index(path: Path, model: str, records: Sequence[ImageRecord]) -> None:
    """A reader sees the old index or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, beside.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"metis": "image folder", "format": _FORMAT, "model": model}) + "\n")
            for record in records:
                line = asdict(record)
                line["fingerprint"]["bits"] = f"{record.fingerprint.bits:x}"
                file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise StorageError(
            f"index {str(path)!r} can't be written: {error.strerror}. Name a path that this user may write to."
        ) from error


_MAX_NOTE = 2_000
_MAX_FILE = 100_000
# ImageDescription, Artist, Copyright, DateTime; Windows: XPTitle, XPComment, XPKeywords, XPSubject
_TAGS = (0x010E, 0x013B, 0x8298, 0x0132, 0x9C9B, 0x9C9C, 0x9C9E, 0x9C9F)
_USER_COMMENT = (0x8769, 0x9286)


def notes_of(file: Path, image: Any, captions: dict[str, str]) -> str:
    """Return what is written in an opened image and beside its file, as one line."""
    noted = [captions.get(file.name, ""), *(_beside(file.with_suffix(suffix)) for suffix in (".txt", ".json"))]
    return " ".join(note for note in (*noted, *notes_in(image)) if note)


def notes_in(image: Any) -> list[str]:
    """Return the notes that an opened image holds; a broken one has none."""
    try:
        found = [value for key, value in image.info.items() if isinstance(value, str) and key != "xmp"]
        found.append(image.info.get("comment"))
        exif = image.getexif()
        found += [exif.get(tag) for tag in _TAGS]
        found.append(exif.get_ifd(_USER_COMMENT[0]).get(_USER_COMMENT[1]))
    except Exception:  # hostile metadata raises anything; the image itself may still be good
        return []
    return list(dict.fromkeys(note for value in found if (note := plain_text(_text(value), _MAX_NOTE))))


def captions_of(folder: Path) -> dict[str, str]:
    """Return captions by file name from the folder's `metadata.jsonl`; lines that can't be read are left out."""
    captions: dict[str, str] = {}
    for line in _read(folder / "metadata.jsonl", 100 * _MAX_FILE).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(name := record.pop("file_name", None), str):
            captions[name] = plain_text(" ".join(_strings(record)), _MAX_NOTE)
    return captions


def _beside(file: Path) -> str:
    content = _read(file, _MAX_FILE)
    if file.suffix == ".json" and content:
        try:
            content = " ".join(_strings(json.loads(content)))
        except (ValueError, RecursionError):
            return ""
    return plain_text(content, _MAX_NOTE)


def _read(file: Path, size: int) -> str:
    try:
        with file.open("rb") as content:
            return content.read(size).decode("utf-8", "replace") if file.is_file() else ""
    except OSError:
        return ""


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        value = bytes(value)
    if not isinstance(value, bytes):
        return ""
    if value[:8] in (b"ASCII\0\0\0", b"\0" * 8):
        value = value[8:]
    utf16 = value[1:2] == b"\0"
    return value.decode("utf-16-le" if utf16 else "utf-8", "replace").rstrip("\0")
