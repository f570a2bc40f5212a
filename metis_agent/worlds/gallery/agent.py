"""The gallery's agent: Python to crop with, and the collection to search in by image."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from langchain_core.tools import BaseTool

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.budget import Budget
from metis_agent.gates.base import Gate, SupportsDecide
from metis_agent.models.local import LocalChatModel
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search.image_folder import ImageFolder

__all__ = ["COLD_START", "REPLY", "gallery_agent", "gallery_model"]

COLD_START = Path(str(files("metis_agent.worlds.gallery") / "weights"))
"""The trained cold start that the package ships."""

REPLY = 16
"""Tokens; the longest reply that is of use has 12."""


def gallery_model() -> LocalChatModel:
    """The packaged cold start, greedy: it crops nearly every picture, also where it can read what is there."""
    return LocalChatModel.load(COLD_START, model_name="gallery", max_new_tokens=REPLY)


def gallery_agent(
    chat: LocalChatModel,
    gate: Gate | SupportsDecide | None = None,
    *,
    tool: PythonTool | None = None,
    collection: ImageFolder | None = None,
) -> MetisAgent:
    """The agent of this world, around a gate: one call is enough for every question.

    Args:
        chat: The policy, with its processor.
        gate: By default the policy decides for itself.
        tool: By default one that opens a sandbox of its own.
        collection: Pictures with what is written beside them; without it there is nothing to search in.
    """
    tools: list[BaseTool] = [tool or PythonTool()]
    if collection is not None:
        # The name is in words, and the tiny model has not learnt to look at what was found.
        tools.append(ImageSearchTool(likeness=collection, limit=1, thumbnail_side=0, label=""))
    return create_metis_agent(chat, tools, gate=gate, budget=Budget(calls=1), block_message="Error.")
