"""The images of a conversation that a piece of code names: `image_1`, `image_2`, ... in their order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from metis_agent.tools.sandboxes.base import NO_IMAGES, InputImage

if TYPE_CHECKING:
    from metis_agent.tools.images import ImageRules

__all__ = ["named_images"]

# With a number, or with one to be put in: f"image_{number}".
_NAME = re.compile(r"\bimage_(?:(\d{1,9})\b|(?!\w))")


def named_images(code: str, messages: Any, rules: ImageRules | None) -> tuple[Mapping[str, InputImage], str]:
    """The images that the code names, and a note where it names one that is not there."""
    named = set(_NAME.findall(code))
    if not named:
        return NO_IMAGES, ""
    from metis_agent.tools.images import conversation_images

    there = conversation_images(messages)
    wanted = {name for name in there if "" in named or name.removeprefix("image_") in named}
    absent = {f"image_{number}" for number in named if number} - set(there)
    note = ""
    if absent:
        last = f"image_1 to image_{len(there)}" if there else "none"
        note = f"The conversation has no {', '.join(sorted(absent))}; its images are: {last}."
    return {name: InputImage(source=there[name], rules=rules) for name in sorted(wanted)}, note
