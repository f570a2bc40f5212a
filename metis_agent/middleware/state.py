"""What the middleware adds to an agent's state: the records of the latest turn, and its own notes on it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware.types import AgentState, OmitFromSchema
from langchain_core.messages import AnyMessage
from typing_extensions import TypedDict

from metis_agent.errors import ConfigurationError
from metis_agent.graphs.records import Records
from metis_agent.turns import turn_of
from metis_agent.types import GateDecision, ModelCall, ToolOutcome

__all__ = ["GateState", "PendingCall", "Turn", "check_keys", "new_turn", "turn_in"]

_OUT_ONLY = OmitFromSchema(input=True, output=False)
_PRIVATE = OmitFromSchema(input=True, output=True)


class PendingCall(TypedDict):
    """A call on its way to its tool, or to the message that stands in for its result."""

    id: str
    name: str
    args: dict[str, Any]
    settled: NotRequired[Any]
    """For a call that must not run: the content of its message."""
    status: NotRequired[str]
    """Of the same: of that message."""


class Turn(TypedDict):
    """The middleware's own notes on the turn; a new one with every run that is not a resumed one."""

    id: str
    question: AnyMessage | None
    """The message that opened the turn: other middleware may summarise it away."""
    seconds: float
    """Time that model and tools have been at work: of parallel tools, the slowest."""
    pending: list[PendingCall]
    step: int
    """Counts the rounds of calls whose outcomes have been taken in."""
    maker: str
    """The process that sent them."""
    draft: dict[str, Any] | None
    """The turn's direct draft, where the gate has asked for one, in plain values."""
    fruitless: int
    """Replies of this turn whose calls were all answered without running."""
    refused: int
    """Latest replies in a row whose calls were all refused by a person or by other middleware."""


class GateState(AgentState[Any]):
    """State of an agent behind a gate; the three lists describe the latest turn."""

    decisions: NotRequired[Annotated[list[GateDecision], _OUT_ONLY, Records(GateDecision, append=False)]]
    outcomes: NotRequired[Annotated[list[ToolOutcome], _OUT_ONLY, Records(ToolOutcome)]]
    calls: NotRequired[Annotated[list[ModelCall], _OUT_ONLY, Records(ModelCall)]]
    metis_turn: NotRequired[Annotated[Turn, _PRIVATE]]


def new_turn(messages: list[AnyMessage]) -> Turn:
    """Notes on a turn that has just begun."""
    opening = turn_of(messages)
    question = opening[0] if opening and opening[0].type == "human" else None
    return Turn(
        id=uuid.uuid4().hex, question=question, seconds=0.0,
        pending=[], step=0, maker="", draft=None, fruitless=0, refused=0,
    )  # fmt: skip


def turn_in(state: Mapping[str, Any]) -> Turn:
    """The notes in a state."""
    turn: Turn | None = state.get("metis_turn")
    return new_turn(state["messages"]) if turn is None else turn


def check_keys(state: Mapping[str, Any]) -> None:
    """Refuse an agent whose own state schema has taken over one of our keys.

    Raises:
        ConfigurationError: it has.
    """
    for key in ("decisions", "outcomes", "calls"):
        if not isinstance(state.get(key), list):
            raise ConfigurationError(
                f"The agent's state has {key}={state.get(key)!r}; MetisGateMiddleware keeps a list of records there. "
                "Rename that key in your state_schema."
            )
