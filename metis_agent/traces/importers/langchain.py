"""LangChain: messages as JSONL, one conversation a line, in any of the three forms that LangChain writes.

`message_to_dict` (`type` and `data`), `dumpd` (`lc`, `id`, `kwargs`) and `model_dump` (flat, with `type`); as a list or
under `messages`, such as the state that a LangGraph agent returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metis_agent.traces.importers.openai import MessageLog

__all__ = ["LangChain"]

_TYPES = {"human", "ai", "system", "tool", "AIMessageChunk"}


class LangChain(MessageLog):
    """Conversations of LangChain messages."""

    name = "langchain"
    title = "LangChain messages, one conversation a line"
    source = "https://reference.langchain.com/python/langchain_core/messages"
    versions = "langchain-core 0.3 to 1.8"

    def recognises(self, record: Mapping[str, Any]) -> bool:
        """Messages that have a type, or are constructors."""
        said = record.get("messages")
        first = next((item for item in said if isinstance(item, Mapping)), {}) if isinstance(said, list) else {}
        return "role" not in first and (first.get("lc") == 1 or first.get("type") in _TYPES)
