"""The direct answer that a gate may ask for before it decides.

Written at the first step of a turn by the chat model, without tools and out of sight of `messages` streams. Where
the gate then says "answer", the draft is the answer, and nothing more is asked. A draft that fails is no draft:
the gate decides without one, and the decision says why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from langchain_core.messages import AIMessage
from langgraph.errors import GraphBubbleUp

from metis_agent.gates.confidence import draft_of
from metis_agent.graphs.answers import has_answer, without_calls
from metis_agent.graphs.notes import Notes
from metis_agent.graphs.setup import Setup
from metis_agent.types import Draft, ModelCall, ToolOutcome

__all__ = ["Drafted", "adrafted", "drafted", "kept_draft"]


def drafted(setup: Setup, state: Mapping[str, Any]) -> Drafted:
    """Ask the model for a draft."""
    result = Drafted(setup, state)
    try:
        result.take(setup.models.drafting.invoke(result.prompt))
    except GraphBubbleUp:
        raise
    except Exception as error:
        result.fail(error)
    return result


async def adrafted(setup: Setup, state: Mapping[str, Any]) -> Drafted:
    """Ask the model for a draft without blocking the event loop."""
    result = Drafted(setup, state)
    try:
        result.take(await setup.models.drafting.ainvoke(result.prompt))
    except GraphBubbleUp:
        raise
    except Exception as error:
        result.fail(error)
    return result


def kept_draft(state: Mapping[str, Any]) -> Draft | None:
    """The draft that was written at the turn's first step."""
    fields = state.get("drafted")
    return Draft(text=fields["text"], log_probs=tuple(fields["log_probs"])) if fields else None


class Drafted:
    """One attempt at a draft, and what it leaves behind."""

    def __init__(self, setup: Setup, state: Mapping[str, Any]) -> None:
        self.prompt = setup.prompt(state["messages"])
        self.draft: Draft | None = None
        self.failure = ""
        self.seconds = 0.0
        # A new turn: what the last one has left in the state is none of its business.
        self._notes = Notes(setup, {"messages": state["messages"]}, "draft")
        self._reply: AIMessage | None = None
        self._started = time.perf_counter()

    def take(self, reply: AIMessage) -> None:
        """Keep the model's reply."""
        self._notes.take(reply)
        self._reply = reply
        self.draft = draft_of(reply)
        self.seconds = time.perf_counter() - self._started

    def fail(self, error: Exception) -> None:
        """Go on without."""
        self.seconds = time.perf_counter() - self._started
        self.draft = self._reply = None
        self.failure = f"the direct draft failed with {type(error).__name__}: {error}"

    def answer(self) -> AIMessage | None:
        """The draft as the turn's answer; `None` where it says nothing."""
        if self._reply is None or not has_answer(without_calls(self._reply)):
            return None
        return self._notes.strip(self._reply)

    @property
    def calls(self) -> list[ModelCall]:
        """The model call, where calls are kept; with the log-probabilities that the gate has read."""
        read = self.draft.log_probs if self.draft else ()
        return [call if call.log_probs or not read else replace(call, log_probs=read) for call in self._notes.calls]

    @property
    def outcomes(self) -> list[ToolOutcome]:
        """Calls that were taken out of the answer."""
        return self._notes.outcomes

    @property
    def record(self) -> dict[str, Any] | None:
        """The draft in plain values, for the later steps of the turn."""
        return None if self.draft is None else {"text": self.draft.text, "log_probs": list(self.draft.log_probs)}
