"""Chat models that keep exact token ids and log-probabilities, so that training sees what was sampled.

Each name is imported when it is asked for: one client does not load what the others need.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.models.local import LocalChatModel
    from metis_agent.models.metis_format import to_metis_turns
    from metis_agent.models.served import ServedChatModel
    from metis_agent.models.vllm import VLLMChatModel
    from metis_agent.models.wire import parse_reply

__all__ = [
    "LocalChatModel",
    "ServedChatModel",
    "VLLMChatModel",
    "parse_reply",
    "to_metis_turns",
]

_MODULES = {
    "LocalChatModel": "local",
    "ServedChatModel": "served",
    "VLLMChatModel": "vllm",
    "parse_reply": "wire",
    "to_metis_turns": "metis_format",
}

__getattr__ = lazy_names(__name__, _MODULES, "train")
