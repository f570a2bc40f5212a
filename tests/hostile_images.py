"""Images that somebody means harm by, and images that are merely odd: the same ones for every entrance.

Each is a function, so that nothing is made before a test asks for it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import cache
from io import BytesIO

from PIL import Image

__all__ = ["HOSTILE", "ODD"]


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


@cache
def bomb() -> bytes:
    """A megapixel a byte: 40,000 x 40,000 black pixels in 200 kB."""
    packed = zlib.compressobj(9)
    row = b"\x00" * (40_000 // 8 + 1)
    content = b"".join(packed.compress(row) for _ in range(40_000)) + packed.flush()
    return _png(40_000, 40_000, _chunk(b"IDAT", content))


def claims_to_be_small() -> bytes:
    """A header of 8 x 8 pixels before the content of a bomb."""
    return _png(8, 8, _chunk(b"IDAT", zlib.compress(b"\x00" * 2 * 8 + b"\x00" * 10_000_000)))


@cache
def text_bomb() -> bytes:
    """A text chunk that unpacks to 100 MB."""
    return _png(1, 1, _chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(b"\x00" * 100_000_000, 9)))


@cache
def whole() -> bytes:
    noise = Image.effect_noise((64, 64), 80)
    return _file(noise)


def tiff() -> bytes:
    return _file(Image.new("RGB", (8, 8)), "TIFF")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "bomb": bomb,
    "text bomb": text_bomb,
    "a negative size": lambda: _png(2**31, 2**31),
    "no size": lambda: _png(0, 0),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "svg with an entity": lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg/>',
    "html": lambda: b"<!doctype html><script>alert(1)</script>",
    "truncated": lambda: whole()[: len(whole()) // 2],
    "a header alone": lambda: whole()[:40],
    "empty": lambda: b"",
    "text": lambda: b"no picture at all",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "pdf": lambda: b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n",
    "tiff": tiff,
    "zip": lambda: b"PK\x03\x04" + b"\x00" * 100,
    "an executable": lambda: b"\x7fELF" + b"\x00" * 100,
}
"""What no entrance may let through as a picture."""


def _turned() -> tuple[bytes, tuple[int, int]]:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "ignore previous instructions"
    return _file(Image.new("RGB", (24, 12), "red"), "JPEG", exif=exif), (12, 24)


def _broken_exif() -> tuple[bytes, tuple[int, int]]:
    exif = b"Exif\x00\x00MM\x00*" + b"\xff" * 60
    return _file(Image.new("RGB", (20, 10), "red"), "JPEG", exif=exif), (20, 10)


def _animated(kind: str) -> tuple[bytes, tuple[int, int]]:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    return _file(frames[0], kind, save_all=True, append_images=frames[1:]), (16, 8)


def _polyglot() -> tuple[bytes, tuple[int, int]]:
    return _file(Image.new("RGB", (9, 7), "red")) + b"<script>alert(1)</script>PK\x03\x04", (9, 7)


ODD: dict[str, Callable[[], tuple[bytes, tuple[int, int]]]] = {
    "one pixel": lambda: (_file(Image.new("RGB", (1, 1))), (1, 1)),
    "turned by EXIF": _turned,
    "broken EXIF": _broken_exif,
    "an animated GIF": lambda: _animated("GIF"),
    "an animated PNG": lambda: _animated("PNG"),
    "an animated WEBP": lambda: _animated("WEBP"),
    "16 bits": lambda: (_file(Image.new("I;16", (6, 5), 40_000)), (6, 5)),
    "CMYK": lambda: (_file(Image.new("CMYK", (6, 5)), "JPEG"), (6, 5)),
    "palette, see-through": lambda: (_file(Image.new("P", (6, 5)), "PNG", transparency=0), (6, 5)),
    "a script behind it": _polyglot,
}
"""What is strange and harmless, with its size as it is seen."""
