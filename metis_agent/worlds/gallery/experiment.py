"""A training run in the gallery: what `metis demo --world gallery` shows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from metis_agent.agent import MetisAgent
from metis_agent.gates.base import Gate
from metis_agent.models.local import LocalChatModel
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import Question
from metis_agent.worlds.experiment import WorldExperiment
from metis_agent.worlds.gallery.agent import COLD_START, REPLY, CachedPython, gallery_agent
from metis_agent.worlds.gallery.pictures import FONTS
from metis_agent.worlds.gallery.questions import KINDS, LEGIBLE, questions, write_collection

__all__ = ["Experiment"]


@dataclass(frozen=True, kw_only=True)
class Experiment(WorldExperiment):
    """A run in the gallery. Only the language model learns: the eyes are good as they are."""

    reply: ClassVar[int] = REPLY
    classes: ClassVar[Mapping[str, Collection[str]]] = {
        "legible": LEGIBLE, "illegible": [kind for kind in KINDS if kind not in LEGIBLE],
    }  # fmt: skip

    kinds: tuple[str, ...] = KINDS
    fonts: Sequence[str] = FONTS
    """Of the held-out questions."""
    cold_start: Path = COLD_START
    steps: int = 150
    questions_per_step: int = 14
    learning_rate: float = 3e-4
    """At 1e-3 forty steps teach as much of when to look closer, and cost a percent of what the crops are read with."""
    test_questions: int = 210
    python: PythonTool = field(default_factory=CachedPython, repr=False, compare=False)

    def questions(self, split: Literal["train", "test"], count: int) -> tuple[Question, ...]:
        """See `WorldExperiment.questions`."""
        fonts = self.fonts if split == "test" else FONTS
        return questions(split, count, seed=self.seed, kinds=self.kinds, fonts=fonts)

    def agent(self, chat: LocalChatModel, gate: Gate | None = None) -> MetisAgent:
        """The agent of this world, around a gate."""
        return gallery_agent(chat, gate, tool=self.python, collection=self._collection)

    def trained(self, model: Any) -> Iterable[torch.nn.Parameter]:
        """See `WorldExperiment.trained`."""
        return [weight for name, weight in model.named_parameters() if ".visual." not in name]

    def close(self) -> None:
        """End the sandbox."""
        self.python.close()

    @cached_property
    def _collection(self) -> ImageFolder:
        return ImageFolder.build(write_collection(self.folder / "collection"))
