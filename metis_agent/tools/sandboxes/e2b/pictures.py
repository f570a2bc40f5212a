"""Images in: loaded here, written to a file of the sandbox, bound to a name. Images out: loaded by the safe loader.

The local backends move bare pixels. E2B's protocol moves files, so here what the code wrote does reach a decoder
of the host: Pillow's PNG or JPEG reader, behind the rules of `load_image`.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from io import BytesIO

from metis_agent.errors import InputError, MissingDependencyError
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.pictures import InputImage, ShownImage, encode_image, load_or_say

__all__ = ["binding", "image_file", "shown_images"]

_MAX_FILE_BYTES = 16 << 20
_MAX_NOTE = 500


def image_file(name: str, image: InputImage) -> tuple[bytes | None, str]:
    """Return the image as a PNG file; or `None`, and why it is not there."""
    loaded, note = load_or_say(name, image)
    if loaded is None:
        return None, note
    file = BytesIO()
    loaded.save(file, "PNG", compress_level=1)
    return file.getvalue(), ""


def binding(name: str, path: str) -> str:
    """Code that binds a name to the image in a file, and no other name."""
    return f"{name} = __import__('PIL.Image', fromlist=['open']).open({path!r}).copy()"


def shown_images(encoded: Sequence[str], limits: SandboxLimits) -> tuple[tuple[ShownImage, ...], list[str]]:
    """Return the images that the code showed, and notes of those that are missing or smaller."""
    shown: list[ShownImage] = []
    notes: list[str] = []
    for number, text in enumerate(encoded[: limits.images], 1):
        try:
            image, smaller = _shown(text, limits)
        except (InputError, MissingDependencyError, ValueError) as error:
            notes.append(f"An image can't be shown: {error}"[:_MAX_NOTE])
            continue
        shown.append(image)
        if smaller:
            notes.append(f"Image {number} is shown smaller than it is: {smaller} pixels.")
    if len(encoded) > limits.images:
        left_out = len(encoded) - limits.images
        notes.append(f"{left_out} more not shown: a call shows at most {limits.images} images.")
    return tuple(shown), notes


def _shown(text: str, limits: SandboxLimits) -> tuple[ShownImage, str]:
    from metis_agent.tools.images import ImageRules, load_image

    rules = ImageRules(max_bytes=_MAX_FILE_BYTES)
    image = load_image(b64decode("".join(text.split()), validate=True), rules).convert("RGB")
    pixels = image.width * image.height
    if pixels <= limits.image_pixels:
        return encode_image(image), ""
    before = f"{image.width} x {image.height}"
    scale = (limits.image_pixels / pixels) ** 0.5
    image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return encode_image(image), f"{image.width} x {image.height} instead of {before}"
