"""Images in messages: reading one from a content block, naming those of a conversation, writing one.

The one reader of the package: gates, models, reports and tools read blocks through it. It decodes nothing, and needs
neither Pillow nor an HTTP client.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage

__all__ = ["conversation_images", "image_block", "image_source"]


def image_source(block: object) -> str | bytes | None:
    """Return what `load_image` takes of a content block (LangChain's, OpenAI's or Anthropic's); `None` of others."""
    if not isinstance(block, Mapping) or block.get("type") not in ("image", "image_url"):
        return None
    inner: Any = block.get("source") or block.get("image_url") or block
    if isinstance(inner, str):
        return inner
    if not isinstance(inner, Mapping):
        return None
    encoded = inner.get("base64") or inner.get("data")
    if isinstance(encoded, str):
        return f"data:;base64,{encoded}"
    url = inner.get("url")
    return url if isinstance(url, str) else None


def conversation_images(messages: object) -> dict[str, str | bytes]:
    """Return the images that the user sent and that tools showed, in their order, as tools and models call them.

    Returns:
        `image_1`, `image_2` and so on, each with what `load_image` takes.
    """
    found: list[str | bytes] = []
    for message in messages if isinstance(messages, Sequence) else ():
        if isinstance(message, HumanMessage | ToolMessage) and isinstance(message.content, list):
            found += [source for block in message.content if (source := image_source(block)) is not None]
    return {f"image_{number}": source for number, source in enumerate(found, start=1)}


def image_block(content: bytes, mime_type: str) -> dict[str, Any]:
    """Return the LangChain content block of a file."""
    return {"type": "image", "base64": base64.b64encode(content).decode(), "mime_type": mime_type}
