"""The latest turn of a conversation: the last human message and all that has come after it.

A checkpointed thread holds many turns. Budgets, the loop guard, gates and trajectories each look at the
latest one only; this is the one place that says where it begins.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from langchain_core.messages import AIMessage, BaseMessage

__all__ = ["is_first_step", "seconds_of", "turn_of"]

MessageT = TypeVar("MessageT", bound=BaseMessage)


def turn_of(messages: Sequence[MessageT]) -> Sequence[MessageT]:
    """Messages from the last human one on; all of them where there is no human message."""
    # By type name: an isinstance check on a message class costs ten times as much.
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].type == "human":
            return messages[index:]
    return messages


def is_first_step(turn: Sequence[BaseMessage]) -> bool:
    """True where neither the model nor a tool has said anything in this turn yet, or it has been answered.

    An answered turn is asked again where the same message is sent twice, or where another agent has answered
    and this one goes on from there.
    """
    if turn and turn[-1].type == "ai":
        last = cast(AIMessage, turn[-1])
        return not (last.tool_calls or last.invalid_tool_calls)
    return all(message.type not in ("ai", "tool") for message in turn)


def seconds_of(state: Mapping[str, Any]) -> float:
    """Time that the turn has been at work: gate, model and tools."""
    decided = sum(decision.seconds for decision in state.get("decisions", ()))
    return float(state.get("seconds", 0.0) + decided)
