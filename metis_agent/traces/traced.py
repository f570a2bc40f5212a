"""What importers deliver: one trace as its model calls, tool runs and messages, whoever recorded it.

Between the importers, which know a format, and `assemble`, which makes trajectories and knows none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metis_agent.traces.messages import Message, Unreadable

__all__ = ["ModelSpan", "ToolSpan", "Trace"]


@dataclass(kw_only=True)
class ModelSpan:
    """One call of a model."""

    id: str
    input: list[Message]
    """What the model read."""
    output: Message | None
    """What it replied; `None` where it failed, or where the record ends before."""
    name: str = ""
    """The graph node or function that asked."""
    parents: tuple[str, ...] = ()
    """Ids of the spans around it, outermost first."""
    model: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    start: float | None = None
    """Unix seconds."""
    end: float | None = None
    of_chunks: bool = False
    """The reply was put together from streamed chunks."""


@dataclass(kw_only=True)
class ToolSpan:
    """One run of a tool."""

    id: str
    name: str
    parents: tuple[str, ...] = ()
    call_id: str = ""
    arguments: Any = None
    content: Any = ""
    """What it gave: text or content blocks."""
    error: str = ""
    cost: float = 0.0
    start: float | None = None
    end: float | None = None


@dataclass(kw_only=True)
class Trace:
    """All that is known of one trace, or of one conversation."""

    id: str
    """Unique within its source; the same trace has the same id in every export."""
    source: str
    models: list[ModelSpan] = field(default_factory=list)
    tools: list[ToolSpan] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """The conversation as the root gives it, or the log: with the final answer."""
    definitions: list[dict[str, Any]] = field(default_factory=list)
    """Tools offered, where no model call says it."""
    every_turn: bool = False
    """The trace is a conversation: each of its turns is a run, not only those with a model call."""
    every_thread: bool = False
    """Model calls that don't follow from each other are conversations of their own."""
    model: str = ""
    conversation: str = ""
    user: str = ""
    name: str = ""
    start: float | None = None
    end: float | None = None
    times: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each turn of a conversation, where they are known otherwise than from model calls."""
    error: str = ""
    ended: bool = True
    """False where the root is missing or had not ended when the export was made."""
    feedback: list[dict[str, Any]] = field(default_factory=list)
    """Each with `key`, and `score`, `value`, `comment` where given."""
    metadata: dict[str, Any] = field(default_factory=dict)
    odd: Unreadable = field(default_factory=Counter)
    """What was unusual and could be handled, counted."""
