"""The garbage collector while rollouts run: it looks at what they make, not at all that the process has loaded.

Hundreds of graph runs at once keep so many objects alive that Python sweeps its whole heap again and again, and with
torch, transformers and LangChain loaded that heap is half a million objects: a third of the time of a small model's
rollouts went there. `gc.freeze` sets the heap aside for the while, and the youngest objects are looked at less often.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heap_set_aside"]

_YOUNG = 50_000
"""Objects made before the youngest are looked at: those of some dozens of turns."""

_lock = threading.Lock()
_inside = 0
_thresholds: tuple[int, int, int] | None = None
_froze = False


@contextmanager
def heap_set_aside() -> Iterator[None]:
    """Set aside what is on the heap now; at the end of the outermost such block everything is as it was.

    A process that has turned its collector off, or frozen a heap of its own, keeps that as it is.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _thresholds, _froze
    with _lock:
        _inside += 1
        if _inside > 1 or not gc.isenabled():
            return
        _thresholds = gc.get_threshold()
        if 0 < _thresholds[0] < _YOUNG:
            gc.set_threshold(_YOUNG, *_thresholds[1:])
        _froze = gc.get_freeze_count() == 0
        if _froze:
            gc.collect(1)  # or what has just become garbage would be kept for the while
            gc.freeze()


def _leave() -> None:
    global _inside, _thresholds, _froze
    with _lock:
        _inside -= 1
        if _inside or _thresholds is None:
            return
        if _froze:
            gc.unfreeze()
        gc.set_threshold(*_thresholds)
        _thresholds, _froze = None, False
