"""What the calls of a tool came to: how many, how they ended, how long they took, what they cost."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

__all__ = ["CallEnd", "ToolUsage", "UsageMeter"]

CallEnd = Literal["ok", "error", "timeout", "cached"]
_KEPT = 1_000


@dataclass(frozen=True, kw_only=True)
class ToolUsage:
    """The sums at one moment."""

    calls: int = 0
    """All of them; `ok`, `errors`, `timeouts` and `cached` add up to it."""
    ok: int = 0
    errors: int = 0
    timeouts: int = 0
    cached: int = 0
    """Answered from the cache, or by the same call that was under way; whoever waited for one that failed is not
    counted."""
    retries: int = 0
    """Further tries, within the calls above."""
    seconds: float = 0.0
    """Of all calls but the cached ones."""
    cost: float = 0.0
    """Declared price of the same, each try counted."""
    seconds_p50: float = 0.0
    """Of the last 1,000 calls that were not cached, as `seconds_p95`."""
    seconds_p95: float = 0.0


class UsageMeter:
    """Adds up the calls; several tools, and many threads, may share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def add(self, end: CallEnd, *, seconds: float = 0.0, cost: float = 0.0, retries: int = 0) -> None:
        """Count one call."""
        with self._lock:
            self._ends[end] += 1
            self._retries += retries
            if end != "cached":
                self._seconds += seconds
                self._cost += cost
                self._latest.append(seconds)

    def read(self) -> ToolUsage:
        """Return the sums so far."""
        with self._lock:
            ends, latest = dict(self._ends), sorted(self._latest)
            return ToolUsage(
                calls=sum(ends.values()),
                ok=ends["ok"],
                errors=ends["error"],
                timeouts=ends["timeout"],
                cached=ends["cached"],
                retries=self._retries,
                seconds=self._seconds,
                cost=self._cost,
                seconds_p50=_quantile(latest, 0.50),
                seconds_p95=_quantile(latest, 0.95),
            )

    def reset(self) -> None:
        """Begin at zero."""
        with self._lock:
            self._ends: dict[CallEnd, int] = {"ok": 0, "error": 0, "timeout": 0, "cached": 0}
            self._retries = 0
            self._seconds = 0.0
            self._cost = 0.0
            self._latest: deque[float] = deque(maxlen=_KEPT)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
