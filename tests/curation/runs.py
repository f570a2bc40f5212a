"""Sound runs as the graph records them, to plant faults in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from metis_agent.types import ModelCall, Question, ToolOutcome, Trajectory

Call = tuple[str, dict[str, Any], str]
"""Tool, arguments, result."""


def run(
    *calls: Call, id: str = "run/0", question: Question | None = None, answer: str = "42", **fields: Any
) -> Trajectory:
    """A finished run with these calls, one a message, and the answer."""
    asked = question or Question(id=f"q:{id}", text="What is 6 times 7?", answer="42", verifier="numeric")
    messages: list[dict[str, Any]] = [{"type": "human", "data": {"content": asked.text}}]
    model_calls, outcomes = [], []
    for number, (tool, arguments, content) in enumerate(calls):
        call = {"name": tool, "args": arguments, "id": f"c{number}", "type": "tool_call"}
        messages.append({"type": "ai", "data": {"content": "", "tool_calls": [call]}})
        messages.append({"type": "tool", "data": {"content": content, "tool_call_id": f"c{number}"}})
        model_calls.append(ModelCall(node="act", step=number, tool_calls=(call,)))
        outcomes.append(ToolOutcome(call_id=f"c{number}", tool=tool, arguments=arguments, status="ok", content=content))
    messages.append({"type": "ai", "data": {"content": answer}})
    model_calls.append(ModelCall(node="act", step=len(calls), text=answer))
    return replace(
        Trajectory(
            id=id, question=asked, answer=answer, messages=tuple(messages), calls=tuple(model_calls),
            outcomes=tuple(outcomes),
        ),
        **fields,
    )  # fmt: skip


def python(code: str, result: str) -> Call:
    return "python", {"code": code}, result


def search(query: str, result: str) -> Call:
    return "text_search", {"query": query}, result


def with_message(trajectory: Trajectory, index: int, **data: Any) -> Trajectory:
    """The run with fields of one message changed."""
    messages = [dict(message) for message in trajectory.messages]
    messages[index] = {**messages[index], "data": {**messages[index]["data"], **data}}
    return replace(trajectory, messages=tuple(messages))


def without_message(trajectory: Trajectory, index: int) -> Trajectory:
    messages = [
        message for place, message in enumerate(trajectory.messages) if place != index % len(trajectory.messages)
    ]
    return replace(trajectory, messages=tuple(messages))


def with_outcome(trajectory: Trajectory, index: int = 0, **fields: Any) -> Trajectory:
    """The run with fields of one outcome changed, its message left as it was."""
    outcomes = list(trajectory.outcomes)
    outcomes[index] = replace(outcomes[index], **fields)
    return replace(trajectory, outcomes=tuple(outcomes))


def with_calls(trajectory: Trajectory, calls: Sequence[ModelCall]) -> Trajectory:
    return replace(trajectory, calls=tuple(calls))
