"""An image of a file or a data set, on its way into a question: checked, and left as it is where a model takes it so.

What a model's service may misread is written anew: an animation (its first frame), a turned photograph, one with more
pixels than the agent reads (shrunk).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from metis_agent.tools.images import ImageRules, load_image

__all__ = ["RULES", "SendableImage", "sendable_image"]

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
