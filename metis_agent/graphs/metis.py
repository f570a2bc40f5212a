"""The graph that `langgraph.json` names, for LangGraph Studio and the LangGraph server.

`graph` is called by the server, not at import, and makes the agent once, in a thread: a model takes its time to load.
Without settings it is the offline almanac agent. METIS_MODEL names another model, as in `init_chat_model`
("openai:gpt-5"; it gets the sandboxed python tool), METIS_GATE the folder of a trained gate. For an agent of your own
point `langgraph.json` at it: a `MetisAgent` is a compiled graph.
"""

from __future__ import annotations

import asyncio
import os
from functools import cache

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate
from metis_agent.gates.reference import ModelGate

__all__ = ["graph"]


async def graph() -> MetisAgent:
    """The agent that the environment describes.

    Raises:
        MissingDependencyError: the model needs an extra that is not installed.
        CheckpointError: METIS_GATE is no gate's folder.
    """
    return await asyncio.to_thread(_agent, os.environ.get("METIS_MODEL", ""), os.environ.get("METIS_GATE", ""))


@cache
def _agent(model: str, folder: str) -> MetisAgent:
    gate: Gate = ModelGate()
    if folder:
        from metis_agent.gates.policy import PolicyGate

        gate = PolicyGate(folder)
    if not model:
        from metis_agent.worlds.almanac.agent import almanac_agent

        return almanac_agent(gate)
    from metis_agent.tools.python import PythonTool

    return create_metis_agent(model, [PythonTool(images=False)], gate=gate, name="metis")
