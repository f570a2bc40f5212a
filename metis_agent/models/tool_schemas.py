"""Tools as the JSON schemas that templates describe, and which of them must, may or can't be called."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from metis_agent.errors import ConfigurationError, UnknownToolError

__all__ = ["ToolSchemas", "resolve_tool_choice"]


class ToolSchemas:
    """Converts tools, remembering each tool object's schema: agents bind the same tools on every call."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[BaseTool], tuple[str, str], dict[str, Any]]] = {}

    def convert(self, tools: Sequence[Any]) -> list[dict[str, Any]]:
        """OpenAI-style schemas of LangChain tools, functions, pydantic classes or ready schemas."""
        return [self._convert(tool) for tool in tools]

    def _convert(self, tool: Any) -> dict[str, Any]:
        if not isinstance(tool, BaseTool):
            return convert_to_openai_tool(tool)
        label = (tool.name, tool.description)
        known = self._known.get(id(tool))
        # An id can be used again once its tool is gone, hence the look through the weak reference.
        if known is not None and known[0]() is tool and known[1] == label:
            return known[2]
        schema = convert_to_openai_tool(tool)
        key = id(tool)
        self._known[key] = (weakref.ref(tool, lambda _: self._known.pop(key, None)), label, schema)
        return schema


def resolve_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> str:
    """The choice in one of four forms: "auto", "none", "any", or the name of a tool.

    Args:
        choice: `None`, "auto", "any", "required", "none", a tool's name, a bool (`True` is "any"), or the
            OpenAI form `{"type": "function", "function": {"name": ...}}`.
        tools: The offered schemas.

    Raises:
        UnknownToolError: A name that is not among the tools.
        ConfigurationError: A call is required where no tool is offered.
    """
    if isinstance(choice, Mapping):
        choice = choice.get("function", {}).get("name", choice.get("name"))
    if choice is None or choice is False or choice == "auto":
        return "auto"
    if choice == "none":
        return "none"
    names = [tool["function"]["name"] for tool in tools]
    if choice is True or choice in ("any", "required"):
        if not names:
            raise ConfigurationError(
                f"tool_choice={choice!r} requires a tool call, but no tool is offered. Bind tools, or leave "
                "tool_choice out."
            )
        return "any"
    if choice not in names:
        raise UnknownToolError(
            f'tool_choice={choice!r} is not the name of an offered tool. Use one of {names!r}, "auto", "any" or "none".'
        )
    return str(choice)
