"""The same crop of the same picture is made once, and it is what the plain tool makes."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import ToolMessage

from metis_agent.rollouts.runner import question_message
from metis_agent.tools.python import PythonTool
from metis_agent.worlds.gallery.crops import CachedPython
from metis_agent.worlds.gallery.questions import questions
from metis_agent.worlds.gallery.tokens import crop_code


def call(tool: PythonTool, code: str, messages: list[Any], number: int) -> ToolMessage:
    arguments = {"code": code, "messages": messages}
    answer: ToolMessage = tool.invoke(
        {"name": "python", "args": arguments, "id": f"call {number}", "type": "tool_call"}
    )
    return answer


def test_a_call_is_made_once_for_each_code_and_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    plain = PythonTool._execute

    def counted(self: PythonTool, code: str, *rest: Any) -> Any:
        runs.append(code)
        return plain(self, code, *rest)

    monkeypatch.setattr(PythonTool, "_execute", counted)
    one, other = (([question_message(question)]) for question in questions("test", 2))
    tool, stock = CachedPython(), PythonTool()
    try:
        first, again = (call(tool, crop_code((1, 1)), one, number) for number in (1, 2))
        assert len(runs) == 1
        assert first.content == again.content
        assert (first.tool_call_id, again.tool_call_id) == ("call 1", "call 2")
        assert call(tool, crop_code((1, 1)), other, 3).content != first.content
        assert call(tool, crop_code((2, 1)), one, 4).content != first.content
        assert len(runs) == 3
        assert call(stock, crop_code((1, 1)), one, 5).content == first.content
        failed = call(tool, "image_7.size", one, 6)
        assert failed.status == "error"
        assert call(tool, "image_7.size", one, 7).status == "error"
    finally:
        tool.close()
        stock.close()
