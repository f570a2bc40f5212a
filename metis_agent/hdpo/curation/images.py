"""Are the images of a question there, and are they images?"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from metis_agent.errors import InputError, StorageError
from metis_agent.hdpo.curation.similarity import images_of
from metis_agent.recording.images import ImageStore, is_image
from metis_agent.types import Question

__all__ = ["image_fault"]

_MAX_BYTES, _MAX_PIXELS = 60_000_000, 89_000_000
"""A question's image is the user's own: wider limits than for what strangers send."""


def image_fault(question: Question, images: ImageStore | None) -> str:
    """What is wrong with the first bad image of a question; empty where all are good.

    References are `sha256:...` of the image store, data URIs, and paths; what stands at an http(s) address is not
    fetched, and let through.
    """
    for reference in images_of(question):
        if fault := _fault(reference, images):
            return f"{reference[:100]!r}: {fault}"
    return ""


def _fault(reference: str, images: ImageStore | None) -> str:
    if reference.startswith(("http://", "https://")):
        return ""
    try:
        if reference.startswith("sha256:"):
            content = images.get_image(reference) if images is not None else b""
        elif reference.startswith("data:"):
            content = base64.b64decode(reference.partition(",")[2], validate=True)
        else:
            content = _file(Path(reference.removeprefix("file://")))
    except (InputError, StorageError, OSError, ValueError, binascii.Error) as error:
        return str(error)
    return _decodes(content)


def _file(path: Path) -> bytes:
    if not path.is_file():  # a device would never end
        raise InputError(f"{str(path)!r} is no file")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise InputError(f"more than {_MAX_BYTES:,} bytes")
    return content


def _decodes(content: bytes) -> str:
    if not is_image(content):
        return "no image" if content else "empty"
    try:
        from PIL import Image
    except ImportError:
        return ""  # without Pillow the beginning has to do
    import io

    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                return f"{image.width} x {image.height} pixels, more than {_MAX_PIXELS:,}"
            image.verify()
    except Exception as error:  # Pillow raises whatever the decoder does
        return f"damaged: {error}"
    return ""
