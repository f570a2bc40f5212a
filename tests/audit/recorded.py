"""Recorded turns for the audit's tests, and models that answer its probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage, message_to_dict

from metis_agent.types import ModelCall, Question, ToolOutcome, Trajectory

Calls = Sequence[tuple[str, dict[str, Any], str]]
"""Tool, arguments, result."""


def run(
    id: str,
    question: str,
    *rounds: Calls,
    answer: str = "done",
    reference: str | None = None,
    kind: str = "",
    history: Sequence[BaseMessage] = (),
    usage: dict[str, int] | None = None,
    seconds: float = 0.0,
    cost: float = 0.0,
    **fields: Any,
) -> Trajectory:
    """A turn with so many rounds of calls; its model calls have `usage` where that is given."""
    messages: list[BaseMessage] = [HumanMessage(question)]
    outcomes, calls = [], []
    for number, made in enumerate(rounds):
        asked = [
            {"name": tool, "args": args, "id": f"{id}-{number}-{place}"} for place, (tool, args, _) in enumerate(made)
        ]
        messages.append(AIMessage("", tool_calls=asked))
        calls.append(ModelCall(node="act", step=number, tool_calls=tuple(asked), usage=usage or {}, seconds=seconds))
        for call, (tool, args, result) in zip(asked, made, strict=True):
            messages.append(ToolMessage(result, tool_call_id=call["id"], name=tool))
            outcomes.append(
                ToolOutcome(call_id=call["id"], tool=tool, arguments=args, status="ok", content=result, cost=cost,
                            seconds=seconds)
            )  # fmt: skip
    messages.append(AIMessage(answer))
    calls.append(ModelCall(node="act", step=len(rounds), text=answer, usage=usage or {}, seconds=seconds))
    return Trajectory(
        id=id, question=Question(id=f"q {question}", text=question, answer=reference, kind=kind), answer=answer,
        messages=tuple(message_to_dict(message) for message in messages), outcomes=tuple(outcomes),
        calls=tuple(calls), history=tuple(message_to_dict(message) for message in history), **fields,
    )  # fmt: skip


def look(query: str = "x", result: str = "found") -> Calls:
    """One call of a tool that reads."""
    return [("look", {"query": query}, result)]


def book(seat: str = "12A", result: str = "booked") -> Calls:
    """One call of a tool that acts."""
    return [("book", {"seat": seat}, result)]


SYSTEM = SystemMessage("Be brief.")
