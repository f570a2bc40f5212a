import gc
from typing import Any

import pytest
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from metis_agent.errors import ConfigurationError, UnknownToolError
from metis_agent.models import tool_schemas
from metis_agent.models.tool_schemas import ToolSchemas, resolve_tool_choice


@tool
def python(code: str) -> str:
    """Run code."""
    return code


class Search(BaseModel):
    """Search the web."""

    query: str


def plain(x: int) -> int:
    """A function.

    Args:
        x: A number.
    """
    return x


def test_all_kinds_of_tools_become_schemas() -> None:
    ready = convert_to_openai_tool(python)
    schemas = ToolSchemas().convert([python, Search, plain, ready])
    assert [schema["function"]["name"] for schema in schemas] == ["python", "Search", "plain", "python"]
    assert schemas[0] == schemas[3] == ready


def test_a_tool_is_converted_once_until_its_description_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[str] = []

    def counting(tool: Any) -> dict[str, Any]:
        converted.append(tool.description)
        return convert_to_openai_tool(tool)

    monkeypatch.setattr(tool_schemas, "convert_to_openai_tool", counting)
    schemas = ToolSchemas()
    mine = python.model_copy()
    schemas.convert([mine, mine])
    mine.description = "Run more code."
    (schema,) = schemas.convert([mine])
    assert converted == ["Run code.", "Run more code."]
    assert schema["function"]["description"] == "Run more code."


def test_forgotten_tools_are_not_kept() -> None:
    schemas = ToolSchemas()
    schemas.convert([python.model_copy()])
    gc.collect()
    assert schemas._known == {}


OFFERED = [{"function": {"name": "python"}}, {"function": {"name": "search"}}]


@pytest.mark.parametrize(
    ("choice", "resolved"),
    [
        (None, "auto"), (False, "auto"), ("auto", "auto"), ("none", "none"), (True, "any"), ("any", "any"),
        ("required", "any"), ("search", "search"),
        ({"type": "function", "function": {"name": "python"}}, "python"),
        ({"type": "tool", "name": "python"}, "python"),
    ],
)  # fmt: skip
def test_choices(choice: object, resolved: str) -> None:
    assert resolve_tool_choice(choice, OFFERED) == resolved


def test_unknown_tool_name_is_refused() -> None:
    with pytest.raises(UnknownToolError, match=r"'web'.*\['python', 'search'\]"):
        resolve_tool_choice("web", OFFERED)


def test_a_required_call_without_tools_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no tool is offered"):
        resolve_tool_choice("any", [])
