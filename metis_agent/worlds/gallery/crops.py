"""The Python tool, which makes the same crop of the same picture once.

The rollouts of one question nearly all crop the same cell, each in a session of its own. What a single call in a fresh
session gives depends on the code and the pictures alone, and opening the session is most of its cost.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable
from typing import Any

from pydantic import PrivateAttr

from metis_agent.tools.cache import ResultCache
from metis_agent.tools.images import conversation_images
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes.base import Execution

__all__ = ["CachedPython"]


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
