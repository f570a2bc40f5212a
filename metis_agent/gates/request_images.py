"""Images of the question that a gate is asked about.

A gate that reads images gets those of the human message, as base64 strings. Only bytes that are in the message:
a gate fetches nothing from the network.
"""

from __future__ import annotations

import re
from typing import Any

from metis_agent.errors import GateError
from metis_agent.turns import turn_of
from metis_agent.types import GateRequest

__all__ = ["read_images"]

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(?P<base64>[A-Za-z0-9+/=\s]+)")


def read_images(request: GateRequest) -> tuple[str, ...]:
    """Images of the turn's question, in order, each the base64 of its file.

    Raises:
        GateError: one is given by a URL, or by an id at a provider.
    """
    turn = turn_of(request.messages)
    content = turn[0].content if turn else ""
    if isinstance(content, str):
        return ()
    return tuple(_base64(block) for block in content if isinstance(block, dict) and _is_image(block))


def _is_image(block: dict[str, Any]) -> bool:
    return block.get("type") in ("image", "image_url")


def _base64(block: dict[str, Any]) -> str:
    """LangChain's own block, OpenAI's `image_url` and Anthropic's `source`."""
    source = block.get("source")
    found = block.get("base64") or (source.get("data") if isinstance(source, dict) else block.get("data"))
    if found:
        return str(found)
    url = block.get("image_url", block.get("url", ""))
    if isinstance(url, dict):
        url = url.get("url", "")
    if match := _DATA_URL.fullmatch(str(url)):
        return match["base64"]
    raise GateError(
        f"The gate can't see the image {str(url or block)[:80]!r}: it fetches nothing. Put the image's bytes into the "
        "message, as base64."
    )
