"""The first tokens of a tool call, for forcing one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from metis_agent.errors import InputError
from metis_agent.models.chat_tokenizer import ChatTokenizer
from metis_agent.models.wire import TOOL_CALL_OPENING

__all__ = ["named_opening"]


def named_opening(tokenizer: ChatTokenizer, schema: Mapping[str, Any]) -> tuple[int, ...]:
    """The opening of a call through the closing quote of the tool's name, as the template writes calls.

    Two calls with different arguments are rendered; what their ids share is certain. Where the token that
    ends the name is not among it (a tokenizer joins the name to its arguments), or the template writes calls
    in another way, it is the bare opening tag.

    Args:
        tokenizer: Renders and encodes.
        schema: The tool's OpenAI-style schema.
    """
    bare = tokenizer.encode(TOOL_CALL_OPENING)
    quoted = json.dumps(schema["function"]["name"], ensure_ascii=False)
    first, second = (tokenizer.encode(_rendered_call(tokenizer, schema, value)) for value in ("0", "a"))
    for length in range(len(bare) + 1, min(len(first), len(second)) + 1):
        if first[:length] != second[:length]:
            return bare
        if quoted in tokenizer.decode(first[:length]):
            return first[:length]
    return bare


def _rendered_call(tokenizer: ChatTokenizer, schema: Mapping[str, Any], value: str) -> str:
    """The text of one call from its opening on; empty where the template has no such tag."""
    function = schema["function"]
    parameters = function.get("parameters", {})
    required = parameters.get("required") or list(parameters.get("properties", {}))[:1]
    call = {"name": function["name"], "arguments": dict.fromkeys(required, value)}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
    ]
    try:
        text = tokenizer.render(chat, [], reply=False)
    except InputError:
        return ""
    start = text.rfind(TOOL_CALL_OPENING)
    return text[start:] if start >= 0 else ""
