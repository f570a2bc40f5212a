"""Loads images that users, pages and models bring, without trusting a byte of them.

From bytes, data URIs, http(s) addresses, LangChain content blocks, and files (as a `Path` only: a string may
come from a model). What comes out is one frame in RGB or RGBA, turned the right way up, of bounded size, and
with nothing of the file's metadata. Needs Pillow, the `images` extra.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_agent.errors import InputError, MissingDependencyError
from metis_agent.tools.download import DownloadRules, download

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "RULES",
    "ImageRules",
    "SendableImage",
    "data_uri_content",
    "load_image",
    "sendable_image",
    "thumbnail",
]

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.ASCII | re.IGNORECASE)
_MAX_DATA_URI_HEAD = 200
_MAX_SCANS = 100
"""Of a JPEG: each makes the decoder walk the whole image. Encoders write ten or so; a hostile file has thousands."""
_MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_WITHOUT_LENGTH = frozenset(bytes([code]) for code in (0x01, *range(0xD0, 0xD9)))
_SMALL_READ = 4_096


@dataclass(frozen=True, kw_only=True)
class ImageRules:
    """What is loaded."""

    max_bytes: int = 20_000_000
    """Of the file, before it is decoded."""
    max_pixels: int = 40_000_000
    """Width times height; a pixel takes 4 bytes once decoded."""
    seconds: float = 10.0
    """For fetching it, and for decoding it."""
    download: DownloadRules | None = None
    """How addresses are fetched; by default from the public internet only. The limits above hold as well."""

    def within(self, seconds: float) -> ImageRules:
        """The same rules with no more time than this."""
        return replace(self, seconds=max(0.001, min(self.seconds, seconds)))


def load_image(source: str | bytes | os.PathLike[str], rules: ImageRules | None = None) -> Image:
    """Return the image, decoded, in mode RGB or RGBA; of an animation the first frame.

    Args:
        source: the file's bytes, a data URI, an http(s) address, or a `Path`.
        rules: what is loaded.

    Raises:
        InputError: it can't be used; the message says why and what would be.
        MissingDependencyError: Pillow is not installed.
    """
    rules = rules or ImageRules()
    until = time.monotonic() + rules.seconds
    return _decoded(_content(source, rules), rules, until)


def thumbnail(image: Image, side: int = 256) -> tuple[bytes, str]:
    """Return a small copy as file content, and its MIME type: JPEG, or PNG where something shows through.

    Args:
        image: as `load_image` returns it.
        side: the longer side at most, in pixels.
    """
    small = image.copy()
    small.thumbnail((side, side))
    file = BytesIO()
    if small.mode == "RGBA":
        small.save(file, "PNG")
        return file.getvalue(), "image/png"
    small.convert("RGB").save(file, "JPEG", quality=80)
    return file.getvalue(), "image/jpeg"


RULES = ImageRules(max_bytes=60_000_000, max_pixels=89_000_000)
"""Wider than for what strangers send: questions are about photographs of 8K. At a few more Pillow warns of a bomb."""

_AGENT = ImageRules()
_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_ORIENTATION, _UPRIGHT = 0x0112, (None, 1)


@dataclass(frozen=True, kw_only=True)
class SendableImage:
    """An image that may be asked about."""

    uri: str
    """Of the `data:` kind."""
    shrunk: bool = False
    """It had more pixels than the agent reads."""


def sendable_image(content: bytes, rules: ImageRules = RULES) -> SendableImage:
    """Check an image.

    Args:
        content: The file's bytes.
        rules: What is loaded.

    Raises:
        InputError: it can't be used; the message says why.
        MissingDependencyError: Pillow is not installed.
    """
    image = load_image(content, rules)
    most = _AGENT.max_pixels
    shrunk = image.width * image.height > most
    if not shrunk and len(content) <= _AGENT.max_bytes and (kind := _as_it_is(content)):
        return SendableImage(uri=_uri(content, kind))
    if shrunk:
        scale = (most / (image.width * image.height)) ** 0.5
        image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return SendableImage(uri=_uri(*_written(image)), shrunk=shrunk)


def _content(source: str | bytes | os.PathLike[str], rules: ImageRules) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, os.PathLike):
        return _file(Path(source), rules)
    if not isinstance(source, str):
        raise InputError(f"{type(source).__name__} is no image; give bytes, a data URI, a web address or a Path.")
    if source[:5].lower() == "data:":
        return data_uri_content(source, rules)
    if source[:8].lower().startswith(("http://", "https://")):
        return _fetched(source, rules)
    raise InputError(f"{source[:100]!r} is no image; give a data URI, an http(s) address, or a Path for a file.")


def _decoded(content: bytes, rules: ImageRules, until: float) -> Image:
    image_module, transpose = _pillow()
    _check_content(content, rules)
    try:
        with image_module.open(_TimedFile(content, until), formats=list(_FORMATS)) as image:
            width, height = image.size
            # Pillow itself only warns, and at twice as many.
            if width * height > rules.max_pixels:
                raise _too_many_pixels(width, height, rules)
            # The clock is looked at whenever the decoder asks for more.
            image.decodermaxblock = _SMALL_READ
            image.load()
            transpose(image, in_place=True)
            return _plain(image)
    except InputError:
        raise
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as error:
        raise InputError(f"the image has more than {rules.max_pixels:,} pixels; give a smaller one.") from error
    except Exception as error:
        # A decoder meets hostile bytes with almost any exception.
        raise InputError(
            f"the image can't be read: {_reason(error)}. Give a whole PNG, JPEG, WEBP or GIF file."
        ) from error


def _check_content(content: bytes, rules: ImageRules) -> None:
    if not content:
        raise InputError("the image is empty: 0 bytes.")
    if len(content) > rules.max_bytes:
        raise InputError(f"the image has {len(content):,} bytes; at most {rules.max_bytes:,} are read.")
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head or head.startswith(b"<?xml"):
        raise InputError("the image is an SVG, which can hold scripts and links; give PNG, JPEG, WEBP or GIF.")
    if content[:2] == b"\xff\xd8" and _scans(content) > _MAX_SCANS:
        raise InputError(f"the image is a JPEG of more than {_MAX_SCANS} scans; save it anew and give that.")
    if head.startswith((b"<!doctype", b"<html")):
        raise InputError("this is a web page and no image; give the address of the image itself.")


class _TimedFile(BytesIO):
    """A file that can be read until its time is up: what a decoder does with hostile bytes can take minutes."""

    def __init__(self, content: bytes, until: float) -> None:
        super().__init__(content)
        self._until = until

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as a file; refuse when the time is up."""
        if time.monotonic() > self._until:
            raise InputError("the image could not be loaded in the time that there is; give a simpler one.")
        return super().read(size)


def _scans(content: bytes) -> int:
    """How many scans the JPEG has, one more than are decoded at most; thumbnails in it and what follows don't count."""
    scans, position = 0, 2
    while scans <= _MAX_SCANS:
        marker = _MARKER.search(content, position)
        if marker is None or marker[1] == _END_OF_IMAGE:
            break
        position = marker.end()
        if marker[1] in _WITHOUT_LENGTH:
            continue
        scans += marker[1] == _START_OF_SCAN
        position += max(2, int.from_bytes(content[position : position + 2], "big"))
    return scans


def _plain(image: Image) -> Image:
    """RGB or RGBA pixels and nothing else: no EXIF, no profile, no comments."""
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would cut them off, not scale them
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    plain = image.convert("RGBA" if transparent else "RGB")
    bare = plain.copy() if plain is image else plain
    bare.info = {}
    bare.getexif().clear()
    return bare


def data_uri_content(uri: str, rules: ImageRules) -> bytes:
    """Return the bytes that a data URI holds; whether they are an image is not looked at.

    Raises:
        InputError: it is none, or it holds more than `rules` allow.
    """
    head = _DATA_URI.match(uri[:_MAX_DATA_URI_HEAD])
    if head is None or not head[3]:
        raise InputError(f"{uri[:40]!r}… is no data URI of an image; it reads 'data:image/png;base64,…'.")
    encoded = uri[head.end() :]
    if len(encoded) > rules.max_bytes * 4 // 3 + 4:
        raise InputError(f"the image has about {len(encoded) * 3 // 4:,} bytes; at most {rules.max_bytes:,} are read.")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data URI of the image is no base64: {error}.") from error


def _fetched(url: str, rules: ImageRules) -> bytes:
    base = rules.download or DownloadRules()
    return download(
        url,
        replace(base, max_bytes=min(base.max_bytes, rules.max_bytes), seconds=min(base.seconds, rules.seconds)),
    )


def _file(path: Path, rules: ImageRules) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would block, or never end
            raise InputError(f"{str(path)!r} is no file.")
        with path.open("rb") as file:
            return file.read(rules.max_bytes + 1)
    except OSError as error:
        raise InputError(f"{str(path)!r} can't be read: {error.strerror}.") from error


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as missing:
        raise MissingDependencyError(
            "images need Pillow; install it with: pip install 'langgraph-metis[images]'"
        ) from missing
    return Image, ImageOps.exif_transpose


def _too_many_pixels(width: int, height: int, rules: ImageRules) -> InputError:
    return InputError(f"the image has {width} x {height} pixels; at most {rules.max_pixels:,} in all are read.")


def _reason(error: Exception) -> str:
    name = type(error).__name__
    return "it is no PNG, JPEG, WEBP or GIF, or it is damaged" if name == "UnidentifiedImageError" else f"{error}"[:200]


def _as_it_is(content: bytes) -> str:
    """The MIME type of a still picture that stands upright; empty for others."""
    from PIL import Image

    # It has been decoded once, within the rules.
    with Image.open(BytesIO(content)) as image:
        still = getattr(image, "n_frames", 1) == 1 and image.getexif().get(_ORIENTATION) in _UPRIGHT
        return _TYPES.get(str(image.format), "") if still else ""


def _written(image: Any) -> tuple[bytes, str]:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    if len(file.getvalue()) <= _AGENT.max_bytes:
        return file.getvalue(), "image/png"
    file = BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue(), "image/jpeg"


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
