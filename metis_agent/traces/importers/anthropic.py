"""Anthropic: message logs as JSONL, one conversation a line or one request a line.

As OpenAI's, in the form of the Messages API: `system` beside the messages, calls as `tool_use` blocks, results as
`tool_result` blocks of a user's message, tools with an `input_schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metis_agent.traces.importers.openai import MessageLog

__all__ = ["Anthropic"]

_BLOCKS = {"tool_use", "tool_result", "thinking"}


class Anthropic(MessageLog):
    """Logs of Anthropic's Messages API."""

    name = "anthropic"
    title = "Anthropic messages, one conversation or one request a line"
    source = "https://docs.anthropic.com/en/api/messages"
    versions = "anthropic-version 2023-06-01, anthropic 0.40 to 2"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """A `system` beside the messages, tools with an `input_schema`, or content blocks that only it has."""
        for body in (record, record.get("request"), record.get("body"), record.get("params")):
            if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list):
                continue
            tools = body.get("tools") or ()
            blocks = [
                block.get("type")
                for message in body["messages"]
                if isinstance(message, Mapping) and isinstance(message.get("content"), list) and "role" in message
                for block in message["content"]
                if isinstance(block, Mapping)
            ]
            if (
                "system" in body
                or _BLOCKS & set(blocks)
                or any("input_schema" in tool for tool in tools if isinstance(tool, Mapping))
            ):
                return True
        response = record.get("response")
        return isinstance(response, Mapping) and response.get("type") == "message"
