"""The nodes that decide, ask the model and record: they fetch what the rules want, and say where to go next."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig
from langgraph.config import get_stream_writer
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command, Send

from metis_agent.graphs.models import BoundModel, Setup
from metis_agent.rules.state import as_dict
from metis_agent.rules.steps import Ask, Reply, Settled, adrive, decide, drive, respond, settle
from metis_agent.rules.turn import Turn
from metis_agent.turns import check_question
from metis_agent.types import GateDecision

__all__ = ["AskingNode", "GateNode", "RecordNode"]


class _Node(Runnable[Mapping[str, Any], Any]):
    """A node of the agent's graph."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.name = name
        self._setup = setup

    def _asker(self, turn: Turn) -> _Asker:
        return _Asker(self._setup, turn)

    def _ended(self, turn: Turn, settled: Settled) -> Command[Any]:
        """The turn ends with a message."""
        turn.end()
        messages: list[AnyMessage] = [settled.message] if settled.message is not None else []
        turn.rules.turn_ended([*turn.messages, *messages], turn.decisions, turn.outcomes)
        return Command(update={"messages": messages, **turn.update()}, goto=self._setup.finish)


class _Asker:
    """Asks the chat model, in the form that a step wants."""

    def __init__(self, setup: Setup, turn: Turn) -> None:
        self._setup = setup
        self._turn = turn

    def _form(self, wanted: Ask) -> tuple[BoundModel, Sequence[AnyMessage]]:
        models, prompt = self._setup.models, self._setup.prompt(self._turn.messages)
        if wanted.again is not None:
            prompt = [*prompt, wanted.again]
        if wanted.allowed:
            return models.acting(wanted.allowed, required=wanted.required), prompt
        return (models.drafting if wanted.node == "draft" else models.answering), prompt

    def sync(self, wanted: Ask) -> Reply:
        model, prompt = self._form(wanted)
        return Reply(message=model.invoke(prompt))

    async def later(self, wanted: Ask) -> Reply:
        model, prompt = self._form(wanted)
        return Reply(message=await model.ainvoke(prompt))


class GateNode(_Node):
    """Opens every step of a turn: asks the gate, or ends the turn where it has nothing left to decide."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, "gate")

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step."""
        turn = self._turn(input)
        if self._answered_directly(turn):
            return self._finished(turn)
        decision, draft = drive(turn, decide(turn, self._setup.offer), self._asker(turn).sync)
        return self._conclude(turn, decision, draft)

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Decide on the next step without blocking the event loop."""
        turn = self._turn(input)
        if self._answered_directly(turn):
            return self._finished(turn)
        decision, draft = await adrive(turn, decide(turn, self._setup.offer), self._asker(turn).later)
        return self._conclude(turn, decision, draft)

    def _turn(self, state: Mapping[str, Any]) -> Turn:
        turn = Turn(self._setup.rules, state)
        if turn.new:
            question = turn.notes["question"]
            check_question(turn.messages if question is None else [question])
        return turn

    def _answered_directly(self, turn: Turn) -> bool:
        """True where every call of the latest message ran, and by a tool whose result is the answer."""
        direct = self._setup.direct_tools
        if not direct or turn.new:
            return False
        results = []
        for message in reversed(turn.messages):
            if isinstance(message, AIMessage):
                break
            if isinstance(message, ToolMessage):
                results.append(message)
        return bool(results) and all(result.status == "success" and result.name in direct for result in results)

    def _finished(self, turn: Turn) -> Command[Any]:
        """End the turn: a tool has had the last word."""
        turn.end()
        turn.rules.turn_ended(turn.messages, turn.decisions, turn.outcomes)
        return Command(update=turn.update(), goto=self._setup.finish)

    def _conclude(self, turn: Turn, decision: GateDecision, draft: Reply | None) -> Command[Any]:
        get_stream_writer()({"type": "metis_decision", **as_dict(decision)})
        if draft is not None:
            # It says something, so settling it asks for nothing more.
            return self._ended(turn, drive(turn, settle(turn, self._setup.offer, decision, draft), _nothing))
        return Command(update=turn.update(), goto="act" if decision.allowed else "answer")


class AskingNode(_Node):
    """Asks the model as the gate decided, and sends each call that may run to its tool."""

    def invoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model and settle its reply."""
        turn = Turn(self._setup.rules, input)
        try:
            step = respond(turn, self._setup.offer, turn.decisions[-1])
            return self._conclude(turn, drive(turn, step, self._asker(turn).sync))
        except GraphBubbleUp:
            raise
        except Exception as error:
            turn.rules.record_failure(turn.recorded(), error)
            raise

    async def ainvoke(self, input: Mapping[str, Any], config: RunnableConfig | None = None, **_: Any) -> Command[Any]:
        """Ask the model without blocking the event loop, and settle its reply."""
        turn = Turn(self._setup.rules, input)
        try:
            step = respond(turn, self._setup.offer, turn.decisions[-1])
            return self._conclude(turn, await adrive(turn, step, self._asker(turn).later))
        except GraphBubbleUp:
            raise
        except Exception as error:
            await asyncio.to_thread(turn.rules.record_failure, turn.recorded(), error)
            raise

    def _conclude(self, turn: Turn, settled: Settled) -> Command[Any]:
        plan = settled.plan
        if plan is None:
            return self._ended(turn, settled)
        update = {"messages": [settled.message, *plan.replies], **turn.update()}
        return Command(update=update, goto=[Send(call["name"], [call]) for call in plan.run] or "gate")


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


def _nothing(wanted: Ask) -> Reply:
    raise AssertionError(f"a draft that is the answer is settled by itself, but {wanted!r} was wanted")
