"""A training run in the almanac: what `metis demo` shows once and `benchmarks/hdpo.py` repeats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.models.local import LocalChatModel
from metis_agent.rules.budget import Budget
from metis_agent.types import Question
from metis_agent.worlds.almanac.agent import COLD_START, Noise, almanac_search, almanac_tools
from metis_agent.worlds.almanac.questions import CALLS_NEEDED, KINDS, Kind, questions
from metis_agent.worlds.experiment import History, WorldExperiment

__all__ = ["COLD_START", "Experiment", "History", "TwoHops"]


@dataclass(frozen=True, kw_only=True)
class Experiment(WorldExperiment):
    """A run in the almanac."""

    reply: ClassVar[int] = 24
    """The longest reply that is of use has 14."""

    kinds: tuple[Kind, ...] = KINDS
    noise: Noise = Noise()
    cold_start: Path = COLD_START

    def questions(self, split: Literal["train", "test"], count: int) -> tuple[Question, ...]:
        """See `WorldExperiment.questions`."""
        return questions(split, count, seed=self.seed, kinds=self.kinds)

    def agent(self, chat: LocalChatModel, gate: Gate | None = None) -> MetisAgent:
        """The agent of this world, around a gate."""
        # Short refusals and few calls: the tiny model reads little, and one long run pads a whole batch.
        return create_metis_agent(
            chat, almanac_tools(noise=self.noise), gate=gate, budget=Budget(calls=2), block_message="Error."
        )


@dataclass(frozen=True, kw_only=True)
class TwoHops(WorldExperiment):
    """A run in the almanac of two hops, from the weights that `cold_start.train_seeking_cold_start` leaves."""

    reply: ClassVar[int] = 32
    """The longest reply that is of use has 23."""

    groups: StratifiedGroups = StratifiedGroups(size=12, direct=3, tool=3, steps=3)
    questions_per_step: int = 12
    learning_rate: float = 1.6e-3

    def questions(self, split: Literal["train", "test"], count: int) -> tuple[Question, ...]:
        """See `WorldExperiment.questions`."""
        return questions(split, count, seed=self.seed, kinds=tuple(CALLS_NEEDED))

    def agent(self, chat: LocalChatModel, gate: Gate | None = None) -> MetisAgent:
        """The agent of this world, around a gate."""
        search = almanac_search(linked=True)
        return create_metis_agent(chat, [search], gate=gate, budget=Budget(calls=6), block_message="Error.")
