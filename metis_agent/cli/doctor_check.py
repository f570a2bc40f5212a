"""One look of `metis doctor`: what it found, and what it is worth where it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Check", "guarded", "said"]

_REMEDIES = {
    "store": "Name a place that this user may write to, with --store.",
    "text search": "Use a Python whose SQLite has FTS5, such as those of python.org, conda and uv.",
    "torch": "Install a PyTorch that fits this machine's driver: https://pytorch.org/get-started",
    "web search": "Check the network and its proxy; the agent works without web search.",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one look found."""

    name: str
    status: Literal["ok", "absent", "broken"]
    """`absent` is what can be done without; `broken` is there, but does not work."""
    detail: str
    remedy: str = ""
    """What to do, where it does not work."""
    core: bool = False
    """True where nothing works without it."""


def guarded(name: str, core: bool, look: Callable[[], Check]) -> Check:
    """A check that breaks is a finding, not the end of the examination."""
    try:
        return look()
    except Exception as error:
        return Check(name=name, status="broken", detail=said(error), core=core, remedy=_REMEDIES.get(name, ""))


def said(error: Exception) -> str:
    """An error, in a line."""
    return f"{type(error).__name__}: {error}"[:500]
