"""Closed worlds in which an agent can be trained and judged without a network, a key or a GPU.

Here is the chat template of both, in the format that `models.wire` reads: tags for roles, calls and answers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TRAINED_ON_TOOLS", "chat_template"]

TRAINED_ON_TOOLS: dict[str, Any] = {"offers_tools_when_direct": True}
"""In the configuration of a model that has learnt to answer directly with its tools still in the prompt."""


def chat_template(content: str) -> str:
    """The template.

    Args:
        content: Jinja's last branches of the `if`, for a message that is not the assistant's: how its content is shown.
    """
    return (
        "{%- for message in messages -%}"
        "{{- '<|' + message.role + '|>' -}}"
        "{%- if message.role == 'assistant' and message.tool_calls -%}"
        "{{- message.content -}}"
        "{%- for call in message.tool_calls -%}"
        "{%- set call = call.function if call.function is defined else call -%}"
        "{{- '<tool_call>' + ({'name': call.name, 'arguments': call.arguments} | tojson) + '</tool_call>' -}}"
        "{%- endfor -%}"
        "{%- elif message.role == 'assistant' -%}"
        "{{- '<answer>' + message.content + '</answer>' -}}"
        f"{content}"
        "{%- endif -%}"
        "{{- '<|end|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
