"""The almanac's agent, ready to be asked: the packaged cold start and the world's tools, which here never lie.

What `metis ask` and the graph for LangGraph Studio run where nobody names a model: no key, no network, no download.
Each question stands alone, since the tiny model has never seen a conversation.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate, SupportsDecide
from metis_agent.models.local import LocalChatModel
from metis_agent.rules.budget import Budget
from metis_agent.worlds.almanac.tools import Noise, almanac_tools

__all__ = ["COLD_START", "EXAMPLES", "almanac_agent", "almanac_model"]

COLD_START = Path(str(files("metis_agent.worlds.almanac") / "weights"))
"""The trained cold start that the package ships."""

EXAMPLES = ("hi", "What is 21 + 34?", "What is 4821 * 7310?", "What is the capital of France?")
"""Questions of the kinds that the tiny model understands."""

_REPLY = 24
"""Tokens; the longest reply that is of use has 14."""


def almanac_model() -> LocalChatModel:
    """The packaged cold start, greedy: it calls a tool on nearly every question, also where it knows the answer."""
    return LocalChatModel.load(COLD_START, model_name="almanac", max_new_tokens=_REPLY)


def almanac_agent(gate: Gate | SupportsDecide | None = None, *, model: LocalChatModel | None = None) -> MetisAgent:
    """The world's agent.

    Args:
        gate: As in `create_metis_agent`.
        model: Such as one trained by HDPO; by default the cold start.
    """
    tools = almanac_tools(noise=Noise(wrong=0.0, error=0.0))
    # Short refusals and few calls: the tiny model reads little.
    return create_metis_agent(
        model or almanac_model(), tools, gate=gate, budget=Budget(calls=2), block_message="Error.", name="metis"
    )
