"""A fingerprint by which an image is known again after scaling, re-encoding or a slight change of colour.

The difference hash (N. Krawetz, "Kind of like that", 2013), along rows and along columns, with the mean colour
beside it: all flat images have the same hash. It does not find crops, rotations or mirror images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Fingerprint", "fingerprint"]

_SIDE = 8
_BITS = 2 * _SIDE * _SIDE
_MAX_COLOUR = 40


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is compared."""

    bits: int
    """128 bits: whether brightness rises from each of 8 x 8 places to the next one, to the right and downwards."""
    colour: tuple[int, int, int]
    """Mean red, green and blue, 0 to 255."""

    def likeness(self, other: Fingerprint) -> float:
        """From 1.0, the same, to 0.0; unrelated images come to about 0.5, and to 0.0 where the colours differ."""
        if max(abs(a - b) for a, b in zip(self.colour, other.colour, strict=True)) > _MAX_COLOUR:
            return 0.0
        return 1.0 - (self.bits ^ other.bits).bit_count() / _BITS


def fingerprint(image: Image) -> Fingerprint:
    """Return the fingerprint of an image in mode RGB or RGBA; what shows through counts as white."""
    if image.mode == "RGBA":
        from PIL import Image as image_module

        ground = image_module.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    colours = image.convert("RGB").resize((_SIDE + 1, _SIDE + 1), resample=5, reducing_gap=3.0)  # 5: HAMMING
    grey = colours.convert("L").tobytes()
    width = _SIDE + 1
    bits = 0
    for y in range(_SIDE):
        for x in range(_SIDE):
            here = y * width + x
            bits = bits << 2 | (grey[here] < grey[here + 1]) << 1 | (grey[here] < grey[here + width])
    mean = colours.resize((1, 1), resample=4).tobytes()  # 4: BOX
    return Fingerprint(bits=bits, colour=(mean[0], mean[1], mean[2]))
