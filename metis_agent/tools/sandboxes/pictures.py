"""Images on their way into a session and out of it, on the host's side.

In: loaded here, by the safe loader, and sent as bare pixels. Out: bare pixels again, so that nothing which the
code wrote reaches a decoder of the host; they are encoded here. See `inside.pictures` for the other side.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

from metis_agent.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

    from metis_agent.tools.images import ImageRules

__all__ = ["InputImage", "ShownImage", "encode_image", "encode_pixels", "load_or_say"]

_MAX_BYTES = 2_000_000
_QUALITIES = (95, 90, 75, 50)
_MANY_COLOURS = 1 << 16
_REMEDY = "images need Pillow; install it with: pip install 'langgraph-metis[images]'"


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """An image that code may work on; loaded when a session first needs it."""

    source: str | bytes = field(repr=False)
    """As `load_image` takes it: the file's bytes, a data URI, or an http(s) address."""
    rules: ImageRules | None = None
    """What is loaded; by default as `load_image` has it."""

    def load(self) -> Image:
        """Return the image, in mode RGB or RGBA.

        Raises:
            InputError: it can't be used; the message says why.
            MissingDependencyError: Pillow is not installed.
        """
        try:
            from metis_agent.tools.images import load_image
        except ImportError as missing:  # of an HTTP client, which the same extra brings
            raise MissingDependencyError(_REMEDY) from missing
        return load_image(self.source, self.rules)


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image that code showed, as a file."""

    base64: str = field(repr=False)
    """The file, encoded: an artifact has to go through JSON."""
    mime_type: str
    width: int
    """In pixels, as `height`."""
    height: int

    @property
    def content(self) -> bytes:
        """The file: PNG or JPEG, at most 2 MB."""
        return b64decode(self.base64)


def load_or_say(name: str, image: InputImage) -> tuple[Image | None, str]:
    """The image; or `None`, and why it is not there in words for the model."""
    try:
        return image.load(), ""
    except (InputError, MissingDependencyError) as error:
        return None, f"{name} is not there: {error}"


def encode_pixels(width: int, height: int, pixels: bytes | memoryview) -> ShownImage:
    """Return an image of RGB pixels, row by row, as a file.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as missing:
        raise MissingDependencyError(_REMEDY) from missing
    return encode_image(Image.frombytes("RGB", (width, height), pixels))


def encode_image(image: Image) -> ShownImage:
    """Return an RGB image as a file of at most 2 MB: PNG of what is drawn, JPEG of what looks like a photograph."""
    content, mime_type = b"", "image/png"
    if image.getcolors(_MANY_COLOURS) is not None:
        # Level 1 takes a third of the time of the default, for files that are little larger.
        content = _saved(image, "PNG", compress_level=1)
    for quality in _QUALITIES:
        if not 0 < len(content) <= _MAX_BYTES:
            content, mime_type = _saved(image, "JPEG", quality=quality), "image/jpeg"
    while len(content) > _MAX_BYTES:
        image = image.reduce(2)
        content = _saved(image, "JPEG", quality=_QUALITIES[-1])
    encoded = b64encode(content).decode()
    return ShownImage(base64=encoded, mime_type=mime_type, width=image.width, height=image.height)


def _saved(image: Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
