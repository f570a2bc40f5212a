"""The gallery's agent, with Python to crop and the collection to search in by image, and a training run of it.

What `metis demo --world gallery` shows. In training the Python tool makes the same crop of the same picture once: the
rollouts of one question nearly all crop the same cell, each in a session of its own. What a single call in a fresh
session gives depends on the code and the pictures alone, and opening the session is most of its cost.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from langchain_core.tools import BaseTool
from pydantic import PrivateAttr

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.gates.base import Gate, SupportsDecide
from metis_agent.messages import conversation_images
from metis_agent.models.local import LocalChatModel
from metis_agent.rules.budget import Budget
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.proxy import ResultCache
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes.base import Execution
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.types import Question
from metis_agent.worlds.experiment import WorldExperiment
from metis_agent.worlds.gallery.pictures import FONTS
from metis_agent.worlds.gallery.questions import KINDS, LEGIBLE, questions, write_collection

__all__ = ["COLD_START", "REPLY", "CachedPython", "Experiment", "gallery_agent", "gallery_model"]

COLD_START = Path(str(files("metis_agent.worlds.gallery") / "weights"))
"""The trained cold start that the package ships."""

REPLY = 16
"""Tokens; the longest reply that is of use has 12."""


def gallery_model() -> LocalChatModel:
    """The packaged cold start, greedy: it crops nearly every picture, also where it can read what is there."""
    return LocalChatModel.load(COLD_START, model_name="gallery", max_new_tokens=REPLY)


def gallery_agent(
    chat: LocalChatModel,
    gate: Gate | SupportsDecide | None = None,
    *,
    tool: PythonTool | None = None,
    collection: ImageFolder | None = None,
) -> MetisAgent:
    """The agent of this world, around a gate: one call is enough for every question.

    Args:
        chat: The policy, with its processor.
        gate: By default the policy decides for itself.
        tool: By default one that opens a sandbox of its own.
        collection: Pictures with what is written beside them; without it there is nothing to search in.
    """
    tools: list[BaseTool] = [tool or PythonTool()]
    if collection is not None:
        # The name is in words, and the tiny model has not learnt to look at what was found.
        tools.append(ImageSearchTool(likeness=collection, limit=1, thumbnail_side=0, label=""))
    return create_metis_agent(chat, tools, gate=gate, budget=Budget(calls=1), block_message="Error.")


class CachedPython(PythonTool):
    """For agents that call it once a run: a second call would not find what the first one left."""

    _turns: threading.Semaphore = PrivateAttr(default_factory=lambda: threading.Semaphore(4))
    """Hundreds of rollouts at once share a model's batches well, but a busy machine can't start as many sandboxes."""
    _made: ResultCache[Execution] = PrivateAttr(default_factory=lambda: ResultCache(10_000))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def _execute(self, code: str, key: Hashable, idle_seconds: float, messages: Any) -> Execution:
        sources = conversation_images(messages).values()
        digests = (hashlib.sha256(it.encode() if isinstance(it, str) else it).digest() for it in sources)
        return self._made.get((code, *digests), lambda: self._in_turn(code, key, idle_seconds, messages))[0]

    def _in_turn(self, code: str, key: Hashable, idle_seconds: float, messages: Any) -> Execution:
        with self._turns:
            return super()._execute(code, key, idle_seconds, messages)


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
