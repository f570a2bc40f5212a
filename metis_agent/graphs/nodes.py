"""The nodes that ask the model, act and answer, and the one that records.

A node that asks the model is written once, as a generator that yields what to ask and is sent the reply; sync
and async runs only differ in who does the asking.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Send

from metis_agent.budget import spending_of
from metis_agent.graphs.answers import ask_again, fallback_answer, has_answer
from metis_agent.graphs.bindings import BoundModel
from metis_agent.graphs.enforcement import plan_calls
from metis_agent.graphs.notes import Notes
from metis_agent.graphs.setup import Setup
from metis_agent.turns import turn_of

__all__ = ["ActNode", "AnswerNode", "RecordNode"]

_Asking = Generator[tuple[BoundModel, Sequence[AnyMessage]] | Command[Any], AIMessage, None]


class _AskingNode(Runnable[Mapping[str, Any], Command[Any]]):
    """A node that asks the model."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    @abstractmethod
    def _ask(self, state: Mapping[str, Any], notes: Notes) -> _Asking:
        """Yield what to ask, get the reply, and so on; at last yield the node's command."""

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model and settle its reply."""
        notes = Notes(self._setup, input, self.name or "")
        asking = self._ask(input, notes)
        try:
            step = next(asking)
            while not isinstance(step, Command):
                model, prompt = step
                step = asking.send(notes.take(model.invoke(prompt)))
            return step
        except GraphBubbleUp:
            raise
        except Exception as error:
            self._setup.record_failure(notes.state(), error)
            raise

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model without blocking the event loop, and settle its reply."""
        notes = Notes(self._setup, input, self.name or "")
        asking = self._ask(input, notes)
        try:
            step = next(asking)
            while not isinstance(step, Command):
                model, prompt = step
                step = asking.send(notes.take(await model.ainvoke(prompt)))
            return step
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(self._setup.record_failure, notes.state(), error)
            raise

    def _answer(self, state: Mapping[str, Any], notes: Notes, reply: AIMessage, reason: str) -> _Asking:
        """End the turn with a reply, or with what stands in for it where it says nothing."""
        message = notes.strip(reply)
        if not has_answer(message):
            prompt = [*self._setup.prompt(state["messages"]), ask_again()]
            message = notes.strip((yield self._setup.models.answering, prompt))
        if not has_answer(message):
            message = fallback_answer(message, reason, state["outcomes"])
        if self._setup.watched:
            outcomes = [*state["outcomes"], *notes.outcomes]
            self._setup.turn_ended([*state["messages"], message], state["decisions"], outcomes)
        yield Command(update=notes.update([message], last=True), goto=self._setup.finish)


class ActNode(_AskingNode):
    """Asks the model with the allowed tools, and sends each call that passes enforcement to its tool."""

    name = "act"

    def _ask(self, state: Mapping[str, Any], notes: Notes) -> _Asking:
        setup, decision = self._setup, state["decisions"][-1]
        model = setup.models.acting(decision.allowed, required=decision.required)
        reply = yield model, setup.prompt(state["messages"])
        if not (reply.tool_calls or reply.invalid_tool_calls):
            yield from self._answer(state, notes, reply, "")
            return
        outcomes = state["outcomes"]
        plan = plan_calls(
            setup, reply, decision,
            spent=spending_of(outcomes, notes.total_seconds), outcomes=outcomes, turn=turn_of(state["messages"]),
        )  # fmt: skip
        notes.outcomes += plan.outcomes
        update = notes.update([plan.message, *plan.replies])
        yield Command(update=update, goto=[Send(call["name"], [call]) for call in plan.run] or "gate")


class AnswerNode(_AskingNode):
    """Asks the model for the answer, without tools."""

    name = "answer"

    def _ask(self, state: Mapping[str, Any], notes: Notes) -> _Asking:
        reply = yield self._setup.models.answering, self._setup.prompt(state["messages"])
        yield from self._answer(state, notes, reply, state["decisions"][-1].reason)


class RecordNode(Runnable[Mapping[str, Any], None]):
    """Writes the finished turn to the trajectory store."""

    def __init__(self, setup: Setup) -> None:
        self.name = "record"
        self._setup = setup

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn."""
        self._setup.record(input)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn in a thread: stores may be slow."""
        await asyncio.to_thread(self._setup.record, input)
