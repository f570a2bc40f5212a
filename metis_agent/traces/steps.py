"""A recorded run as the states that it visited: what the model had read each time it answered or went on.

Read by the audit and by training on decision points; written by nobody, since it follows from a `Trajectory`.

How a conversation is kept: each turn is a trajectory of its own. Its `messages` are the turn (from the user's message
on), its `history` is what the model had read before them: the system prompt and the earlier turns, as it saw them, so
trimmed or summarised where the agent did that. The record stands alone: `history + messages` is the whole prompt, and
no other record is needed to ask a model again. `conversation` names what its turns have in common and
`metadata["turn"]` counts them from 0; `tools` holds the definitions that were offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage, messages_from_dict

from metis_agent.errors import InputError
from metis_agent.types import ModelCall, OutcomeStatus, ToolOutcome, Trajectory

__all__ = ["Step", "ToolRound", "steps_of"]

_LOST = "This call has no result: the run that made it broke off."


@dataclass(frozen=True, kw_only=True)
class ToolRound:
    """The tool calls that one reply of the model asked for, each with what came back."""

    outcomes: tuple[ToolOutcome, ...]

    @property
    def executed(self) -> int:
        """Calls that really ran: blocked and repeated ones don't count."""
        return sum(outcome.executed for outcome in self.outcomes)

    @property
    def cost(self) -> float:
        """Declared cost of the calls that ran."""
        return sum(outcome.cost for outcome in self.outcomes if outcome.executed)

    @property
    def seconds(self) -> float:
        """Time until the last result was there; calls of one reply run side by side."""
        return max((outcome.seconds for outcome in self.outcomes), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Step:
    """State s_k of a run, and what the run did there: it called tools, or it answered."""

    index: int
    """k: how many tool rounds came before."""
    messages: tuple[BaseMessage, ...]
    """What the model had read: history, question, and the first k rounds. Any provider accepts them: a call whose
    result is missing has one that says so, and a result that no call asked for is left out."""
    reply: AIMessage | None
    """What the model said here; `None` where the record ends before."""
    round: ToolRound | None
    """The tool round that followed; `None` at the last step."""
    model_call: ModelCall | None = None
    """The record of the reply: tokens, seconds, model; `None` where there is none."""

    @property
    def answered(self) -> bool:
        """True where the run answered here, so at most at the last step."""
        return self.reply is not None and not _calls_of(self.reply)


def steps_of(trajectory: Trajectory) -> tuple[Step, ...]:
    """Return s_0 .. s_K of a run with K tool rounds: all but the last have a round, the last alone can be an answer.

    A run without tools has one step. Where the run broke off, the last step has no reply, or one that asks for tools
    and got nothing. Source: the unit of optimal stopping (Longstaff and Schwartz, 2001) on an agent's run.

    Raises:
        InputError: a message is not as LangChain writes it.
    """
    turn = _messages(trajectory, trajectory.messages)
    seen = _with_all_results(_messages(trajectory, trajectory.history))
    results = {message.tool_call_id: message for message in turn if isinstance(message, ToolMessage)}
    outcomes = {outcome.call_id: outcome for outcome in trajectory.outcomes}
    records = _records(turn, trajectory.calls)
    steps: list[Step] = []
    ended = False
    for position, message in enumerate(turn):
        if isinstance(message, ToolMessage):
            continue  # stands after its call, below
        if isinstance(message, AIMessage):
            asked = _calls_of(message)
            found = [results.get(call["id"]) for call in asked]
            last = not any(isinstance(later, AIMessage) for later in turn[position + 1 :])
            ended = last and not any(found)
            if ended or any(found):
                steps.append(
                    Step(
                        index=len(steps),
                        messages=tuple(seen),
                        reply=message,
                        round=None if ended else _round(asked, found, outcomes),
                        model_call=records.get(position),
                    )
                )
            seen.append(message)
            seen += [result or _lost(call) for call, result in zip(asked, found, strict=True)]
        else:
            seen.append(message)
    if not ended:
        steps.append(Step(index=len(steps), messages=tuple(seen), reply=None, round=None))
    return tuple(steps)


def _messages(trajectory: Trajectory, records: Sequence[Mapping[str, Any]]) -> list[BaseMessage]:
    try:
        return messages_from_dict([dict(record) for record in records])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"trajectory {trajectory.id!r} holds a message that LangChain can't read: {error}. "
            "Messages are written as message_to_dict does."
        ) from error


def _calls_of(message: AIMessage) -> list[dict[str, Any]]:
    return [dict(call) for call in (*message.tool_calls, *message.invalid_tool_calls)]


def _with_all_results(messages: Iterable[BaseMessage]) -> list[BaseMessage]:
    """Each call followed by its results, and no result without a call."""
    messages = list(messages)
    results = {message.tool_call_id: message for message in messages if isinstance(message, ToolMessage)}
    mended: list[BaseMessage] = []
    for message in messages:
        if isinstance(message, ToolMessage):
            continue
        mended.append(message)
        if isinstance(message, AIMessage):
            mended += [results.get(call["id"]) or _lost(call) for call in _calls_of(message)]
    return mended


def _lost(call: Mapping[str, Any]) -> ToolMessage:
    return ToolMessage(_LOST, name=call["name"] or "unnamed", tool_call_id=call["id"] or "", status="error")


def _round(
    asked: Sequence[Mapping[str, Any]], found: Sequence[ToolMessage | None], outcomes: Mapping[str, ToolOutcome]
) -> ToolRound:
    return ToolRound(
        outcomes=tuple(
            outcomes.get(call["id"] or "") or _outcome(call, result) for call, result in zip(asked, found, strict=True)
        )
    )


def _outcome(call: Mapping[str, Any], result: ToolMessage | None) -> ToolOutcome:
    """What the messages say of a call that has no outcome on record."""
    status: OutcomeStatus = "ok" if result is not None and result.status == "success" else "error"
    arguments = call["args"] if isinstance(call["args"], Mapping) else {}
    content = _LOST if result is None else str(result.text)
    return ToolOutcome(
        call_id=call["id"] or "", tool=call["name"] or "", arguments=arguments, status=status, content=content
    )


def _records(turn: Sequence[BaseMessage], calls: Sequence[ModelCall]) -> dict[int, ModelCall]:
    """The model call behind each reply, by its position; drafts and calls of sub-agents are passed over."""
    found: dict[int, ModelCall] = {}
    begin = 0
    for position, message in enumerate(turn):
        if not isinstance(message, AIMessage):
            continue
        ids = [call["id"] for call in _calls_of(message)]
        for place in range(begin, len(calls)):
            call = calls[place]
            if [asked.get("id") for asked in call.tool_calls] == ids and (ids or call.text == str(message.text)):
                found[position] = call
                begin = place + 1
                break
    return found
