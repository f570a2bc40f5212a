"""The nodes that decide, ask the model and record: they fetch what the rules want, and say where to go next."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Send

from metis_agent.graphs.models import BoundModel, Setup
from metis_agent.rules.answers import sendable
from metis_agent.rules.asking import Ask, Reply
from metis_agent.rules.state import check_question
from metis_agent.rules.turn import Turn, adrive, decide, drive, respond

__all__ = ["AskingNode", "GateNode", "RecordNode"]


class _Node(Runnable[Mapping[str, Any], Any]):
    """A node of the agent's graph."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.name = name
        self._setup = setup

    def _form(self, turn: Turn, wanted: Ask) -> tuple[BoundModel, Sequence[AnyMessage]]:
        """The chat model in the form that a step wants, and the conversation as it is to see it."""
        setup, prompt = self._setup, sendable(turn.messages)
        if setup.system_message is not None:
            prompt = [setup.system_message, *prompt]
        if wanted.after:
            prompt = [*prompt, *wanted.after]
        if wanted.allowed:
            return setup.models.acting(wanted.allowed, required=wanted.required), prompt
        if wanted.node == "draft":
            return setup.models.drafting(prompt, log_probs=wanted.log_probs), prompt
        return setup.models.answering(prompt, again=wanted.again), prompt

    def _ask(self, turn: Turn, wanted: Ask) -> Reply:
        model, prompt = self._form(turn, wanted)
        return Reply(message=model.invoke(prompt))

    async def _aask(self, turn: Turn, wanted: Ask) -> Reply:
        model, prompt = self._form(turn, wanted)
        return Reply(message=await model.ainvoke(prompt))


class GateNode(_Node):
    """Opens every step of a turn: asks the gate, or ends the turn where it has nothing left to decide."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "gate")

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        if turn.new:
            check_question(turn.notes["question"], turn.messages)
        elif setup.direct_tools and _answered_directly(turn, setup.direct_tools):
            return Command(update=turn.end(), goto=setup.finish)
        decision, draft = drive(turn, decide(turn, setup.offer), self._ask)
        get_stream_writer()({"type": "metis_decision", **vars(decision)})
        if draft is None:
            return Command(update=turn.update(), goto="act" if decision.allowed else "answer")
        settled = drive(turn, respond(turn, setup.offer, decision, draft), self._ask)
        return Command(update=turn.end(settled.message), goto=setup.finish)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step without blocking the event loop."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        if turn.new:
            check_question(turn.notes["question"], turn.messages)
        elif setup.direct_tools and _answered_directly(turn, setup.direct_tools):
            return Command(update=turn.end(), goto=setup.finish)
        decision, draft = await adrive(turn, decide(turn, setup.offer), self._aask)
        get_stream_writer()({"type": "metis_decision", **vars(decision)})
        if draft is None:
            return Command(update=turn.update(), goto="act" if decision.allowed else "answer")
        settled = await adrive(turn, respond(turn, setup.offer, decision, draft), self._aask)
        return Command(update=turn.end(settled.message), goto=setup.finish)


class AskingNode(_Node):
    """Asks the model as the gate decided, and sends each call that may run to its tool."""

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model and settle its reply."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        try:
            settled = drive(turn, respond(turn, setup.offer, turn.decisions[-1]), self._ask)
        except GraphBubbleUp:
            raise
        except Exception as error:
            setup.rules.record_failure(turn.recorded(), error)
            raise
        if settled.plan is None:
            return Command(update=turn.end(settled.message), goto=setup.finish)
        goto: Any = list(map(Send, settled.plan.tools, settled.plan.run)) or "gate"
        return Command(update=turn.update(settled.message, *settled.plan.replies), goto=goto)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model without blocking the event loop, and settle its reply."""
        turn, setup = Turn(self._setup.rules, input), self._setup
        try:
            settled = await adrive(turn, respond(turn, setup.offer, turn.decisions[-1]), self._aask)
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(setup.rules.record_failure, turn.recorded(), error)
            raise
        if settled.plan is None:
            return Command(update=turn.end(settled.message), goto=setup.finish)
        goto: Any = list(map(Send, settled.plan.tools, settled.plan.run)) or "gate"
        return Command(update=turn.update(settled.message, *settled.plan.replies), goto=goto)


class RecordNode(_Node):
    """Writes the finished turn to the trajectory store."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "record")

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn."""
        rules = self._setup.rules
        rules.record(Turn(rules, input).recorded())

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> None:
        """Record the turn in a thread: stores may be slow."""
        await asyncio.to_thread(self.invoke, input)


def _answered_directly(turn: Turn, direct: Collection[str]) -> bool:
    """True where every call of the latest message ran, and by a tool whose result is the answer."""
    results = []
    for message in reversed(turn.messages):
        if isinstance(message, AIMessage):
            break
        if isinstance(message, ToolMessage):
            results.append(message)
    return bool(results) and all(result.status == "success" and result.name in direct for result in results)
