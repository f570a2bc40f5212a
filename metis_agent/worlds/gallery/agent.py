"""The gallery's agent, and how a policy of this world is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.budget import Budget
from metis_agent.gates.base import Gate
from metis_agent.hdpo.measure import Measurement, Probes, measure
from metis_agent.hdpo.rollouts import Rollouts
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.tools.python import PythonTool
from metis_agent.types import Trajectory
from metis_agent.worlds.gallery.questions import questions

__all__ = ["REPLY", "gallery_agent", "measure_policy"]

REPLY = 16
"""Tokens; the longest reply that is of use has 12."""


def gallery_agent(chat: LocalChatModel, gate: Gate | None = None, *, tool: PythonTool | None = None) -> MetisAgent:
    """The agent of this world, around a gate: one crop is enough for every picture.

    Args:
        chat: The policy, with its processor.
        gate: By default the policy decides for itself.
        tool: By default one that opens a sandbox of its own.
    """
    return create_metis_agent(chat, [tool or PythonTool()], gate=gate, budget=Budget(calls=1), block_message="Error.")


def measure_policy(
    policy: Path,
    folder: Path,
    *,
    count: int = 200,
    seed: int = 0,
    temperature: float = 0.0,
    probes: Probes = Probes(),
    progress: Callable[[Trajectory], None] = lambda _: None,
) -> Measurement:
    """Measure a policy's folder on held-out pictures; a measurement that was stopped goes on.

    Args:
        policy: Model and processor.
        folder: Where the trajectories go.
        count: Pictures, half of them with large numbers.
        seed: Of the pictures and of all sampling.
        temperature: Of the free runs; the probes sample at 1.
        probes: How many forced runs.
        progress: Called with each finished trajectory.
    """
    chat = LocalChatModel.load(policy, temperature=temperature, max_new_tokens=REPLY)
    sampled = chat.model_copy(update={"temperature": 1.0})
    tool = PythonTool()
    try:
        free, forced = (
            # Each run holds a sandboxed Python while it lasts: fewer at once than a text world has.
            Rollouts(
                lambda gate, it=it: gallery_agent(it, gate, tool=tool),  # type: ignore[misc]
                TrajectoryStore(folder),
                concurrency=32,
            )
            for it in (chat, sampled)
        )
        return measure(
            free, questions("test", count, seed=seed), name=folder.name, seed=seed, probes=probes,
            probe_rollouts=forced, progress=progress,
        )  # fmt: skip
    finally:
        tool.close()
