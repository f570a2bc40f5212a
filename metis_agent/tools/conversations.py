"""Which calls of a tool belong to one conversation, and so share what the tool keeps for it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.runtime import get_runtime

__all__ = ["session_key"]


def session_key(config: RunnableConfig) -> tuple[str, Hashable] | None:
    """Which calls share a session.

    Returns:
        `("thread", thread_id)`; without a thread, `("run", something that only this graph run has)`; outside
        of a graph `None`: the call shares with none.
    """
    thread = (config.get("configurable") or {}).get("thread_id")
    if thread:
        return "thread", str(thread)
    try:
        runtime: Any = get_runtime()
    except (RuntimeError, KeyError):
        runtime = None
    run_id = getattr(getattr(runtime, "execution_info", None), "run_id", None)
    if run_id:
        return "run", str(run_id)
    # The same object in every step of a run. As part of the key it lives on, so that no later run's has its id.
    control = getattr(runtime, "control", None)
    return ("run", control) if control is not None else None
