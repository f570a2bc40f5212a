"""Images of trajectories, as the report embeds them: once each, small, and only what a browser draws safely.

PNG, JPEG, GIF and WebP by their first bytes, whatever the record calls them: an SVG is a document, not a picture. A
larger one is shrunk where Pillow is installed. What stands at an address is not fetched, neither now nor by the page.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from typing import Any

from metis_agent.errors import InputError, StorageError
from metis_agent.hdpo.report.text import clipped
from metis_agent.recording.images import ImageStore

__all__ = ["Pictures"]

_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}
_FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
_SIDE = 1024
_PIXELS = 40_000_000


class Pictures:
    """The images of one report.

    Args:
        each: Bytes that one may have; a larger one is shrunk.
        total: Bytes of all together; what comes after is named, not shown.
    """

    def __init__(self, *, each: int = 300_000, total: int = 24_000_000) -> None:
        self._each, self._left = each, total
        self._names: dict[str, int] = {}
        self.embedded: list[str] = []
        """Data URIs, in the order of their numbers."""
        self.left_out = 0
        """Images that are only named."""

    def part_of(self, block: Mapping[str, Any], store: ImageStore) -> dict[str, Any]:
        """A content block as the page shows it: `{"image": number}`, or the reason why not.

        Args:
            block: LangChain's own, OpenAI's `image_url` or Anthropic's `source`.
            store: Where `sha256:` references are looked up.
        """
        try:
            content = _bytes_of(block, store)
        except (InputError, StorageError, binascii.Error, ValueError) as error:
            self.left_out += 1
            return {"note": f"image not shown: {clipped(str(error), 300)}"}
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._names:
            try:
                kind, shown = self._fit(content)
            except InputError as error:
                self.left_out += 1
                return {"note": f"image not shown: {error}"}
            self._left -= len(shown)
            self._names[digest] = len(self.embedded)
            self.embedded.append(f"data:{kind};base64,{base64.b64encode(shown).decode()}")
        return {"image": self._names[digest]}

    def _fit(self, content: bytes) -> tuple[str, bytes]:
        kind = _kind_of(content)
        _check_size(content)
        if len(content) > self._each:
            kind, content = "image/jpeg", _shrunk(content)
        if len(content) > min(self._each, self._left):
            raise InputError(f"{len(content):,} bytes, more than this report has room for.")
        return kind, content


def _bytes_of(block: Mapping[str, Any], store: ImageStore) -> bytes:
    source = block.get("source")
    given = block.get("base64") or (source.get("data") if isinstance(source, Mapping) else block.get("data"))
    if isinstance(given, str) and given:
        return base64.b64decode(given, validate=True)
    url = block.get("image_url", block.get("url", ""))
    url = str(url.get("url", "") if isinstance(url, Mapping) else url)
    if url.startswith("sha256:"):
        return store.get_image(url)
    if url.startswith("data:") and ";base64," in url[:100]:
        return base64.b64decode(url.partition(",")[2], validate=True)
    raise InputError(f"{url[:200]!r} is not in the record, and a report fetches nothing.")


def _kind_of(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    for start, kind in _TYPES.items():
        if content.startswith(start):
            return kind
    raise InputError(f"its {len(content):,} bytes are no PNG, JPEG, GIF or WebP.")


def _check_size(content: bytes) -> None:
    """A few bytes may claim more pixels than a reader's browser has memory for."""
    try:
        from PIL import Image
    except ImportError:
        return  # then nothing but its first bytes is known
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as error:  # Pillow raises whatever the decoder does
        raise InputError(f"it can't be decoded: {error}.") from error
    if width * height > _PIXELS:
        raise InputError(f"{width} x {height} pixels are more than {_PIXELS:,}.")


def _shrunk(content: bytes) -> bytes:
    try:
        from PIL import Image
    except ImportError as missing:
        raise InputError(f"{len(content):,} bytes are shrunk by Pillow, which isn't installed.") from missing
    flat = io.BytesIO()
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            image.thumbnail((_SIDE, _SIDE))
            image.convert("RGB").save(flat, "JPEG", quality=80)
    except Exception as error:  # Pillow raises whatever the decoder does
        raise InputError(f"it can't be decoded: {error}.") from error
    return flat.getvalue()
