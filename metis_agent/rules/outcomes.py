"""From what a tool returned or raised to its outcome, and where outcomes wait until a step takes them to state.

In our own graph a tool's node writes its outcome to state. Behind `create_agent` a result passes through other
middleware, which may look for a plain `ToolMessage`: it stays as the tool gave it, and its outcome waits in a buffer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import AnyMessage, SystemMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool, ToolException
from langgraph import errors as langgraph_errors
from langgraph.errors import GraphBubbleUp
from langgraph.prebuilt.tool_node import ToolInvocationError
from langgraph.stream import ProtocolEvent, StreamTransformer
from langgraph.types import Command, Overwrite
from pydantic import ValidationError

from metis_agent.deadline import DeadlineError, NotCalledError, arun_in_thread, run_async
from metis_agent.errors import InfrastructureError, ToolError, is_outage, note_outage
from metis_agent.messages import text_of, turn_of
from metis_agent.recording.recorder import as_told, outcomes_as_told
from metis_agent.rules.rules import Offer, Offered
from metis_agent.rules.state import Notes, PendingCall
from metis_agent.types import OutcomeStatus, ToolOutcome

__all__ = [
    "InLoop",
    "InThread",
    "OutcomeBuffer",
    "RecordsAsTold",
    "ToolResult",
    "abandoned",
    "as_left",
    "commands_of",
    "failure_of",
    "outcome_of",
    "records_as_told",
    "without_records",
]

ToolResult = Any
"""A `ToolMessage`, a `Command`, or a list of both."""

_OURS = frozenset({"decisions", "outcomes", "calls", "metis_turn", "metis_run"})
_KEPT_TURNS = 10_000


def abandoned(call: ToolCall, limit: float, error: DeadlineError) -> tuple[OutcomeStatus, ToolMessage]:
    """What the model reads of a call that took longer than it may, or was not made as too many such go on."""
    status: OutcomeStatus = "timeout"
    text = f"{call['name']} gave no result within {limit:.3g} seconds and was abandoned."
    if isinstance(error, NotCalledError):
        status, text = "blocked", f"{call['name']}: {error}."
    return status, ToolMessage(text, name=call["name"], tool_call_id=call["id"], status="error")


def failure_of(call: ToolCall, error: Exception, limit: float | None) -> tuple[OutcomeStatus, ToolMessage]:
    """What the model reads of a failed call.

    Raises:
        Exception: the same error, where it is not for the model: interrupts, commands to a parent graph,
            infrastructure failures, and a store or state that the tool asks for and the agent does not have.
    """
    if isinstance(error, GraphBubbleUp | InfrastructureError) or _is_invalid_resume(error) or _lacks_its_own(error):
        raise error
    name = call["name"]
    if isinstance(error, DeadlineError):
        return abandoned(call, limit or 0.0, error)
    if isinstance(error, ValidationError):
        text = str(ToolInvocationError(name, error, call["args"]))
    elif isinstance(error, ToolException | ToolError | ToolInvocationError):
        text = str(error)
    else:
        if is_outage(error):
            note_outage(error)
        text = f"{name} failed with {type(error).__name__}: {error}"
    return "error", ToolMessage(text, name=name, tool_call_id=call["id"], status="error")


def outcome_of(
    call: ToolCall, result: ToolResult, *, seconds: float, cost: float, status: OutcomeStatus | None = None
) -> tuple[ToolOutcome, list[Any]]:
    """The outcome of a call that ran, and its result as a list, with a message where it held none for the call.

    Args:
        call: the call.
        result: what the tool returned, or what `failure_of` made of its error.
        seconds: duration.
        cost: declared price of one call; what was blocked costs nothing.
        status: the outcome's; by default that of the message in the result.
    """
    items: list[Any] = list(result) if isinstance(result, list) else [result]
    message = _message_for(call, items)
    if message is None:
        message = ToolMessage(
            f"{call['name']} returned nothing that answers the call.",
            name=call["name"], tool_call_id=call["id"], status="error",
        )  # fmt: skip
        if not _leaves_the_graph(items):
            items.append(message)
    outcome = ToolOutcome(
        call_id=call["id"] or "",
        tool=call["name"],
        arguments=call["args"],
        status=status or ("error" if message.status == "error" else "ok"),
        content=text_of(message),
        seconds=seconds,
        cost=0.0 if status == "blocked" else cost,
    )
    return outcome, items


def commands_of(
    call: ToolCall, result: ToolResult, *, seconds: float, cost: float, status: OutcomeStatus | None = None
) -> list[Command[Any]]:
    """What a tool's node writes to state: the messages, the outcome, and the tool's own updates; see `outcome_of`."""
    outcome, items = outcome_of(call, result, seconds=seconds, cost=cost, status=status)
    messages = [item for item in items if isinstance(item, ToolMessage)]
    own: Command[Any] = Command(update={"messages": messages, "outcomes": [dict(vars(outcome))]})
    return [own, *[without_records(item) for item in items if isinstance(item, Command)]]


def as_left(state: Mapping[str, Any], messages: Sequence[AnyMessage]) -> dict[str, Any]:
    """The turn's records, where other code has changed the messages that they are of."""
    told = records_as_told(state, messages)
    return {key: Overwrite([dict(vars(record)) for record in records]) for key, records in told.items()}


class RecordsAsTold(StreamTransformer):
    """Keeps out of a snapshot's records what other transformers have taken out of the messages beside them."""

    required_stream_modes = ("values",)

    def init(self) -> dict[str, Any]:
        """It adds nothing to a stream."""
        return {}

    def process(self, event: ProtocolEvent) -> bool:
        """Change the snapshot in its place: wherever this stands among the transformers, the last one counts."""
        snapshot = event["params"]["data"]
        # Other graphs within this one, or around it, have states of their own.
        if event["method"] == "values" and isinstance(snapshot, dict) and snapshot.get("metis_turn"):
            snapshot.update(records_as_told(snapshot, snapshot["messages"]))
        return True


def records_as_told(state: Mapping[str, Any], messages: Sequence[AnyMessage]) -> dict[str, list[Any]]:
    """Those of the turn's records that the messages do not bear out, as they do."""
    outcomes, calls = state.get("outcomes", ()), state.get("calls", ())
    told: dict[str, list[Any]] = {
        "outcomes": outcomes_as_told(messages, outcomes),
        "calls": as_told(turn_of(messages), calls),
    }
    return {key: records for key, records in told.items() if records != list(state.get(key, ()))}


def without_records(result: ToolResult) -> ToolResult:
    """A tool's result without the records of another agent that the tool has asked: they are not this turn's."""
    if isinstance(result, list):
        return [without_records(item) for item in result]
    if isinstance(result, Command) and isinstance(result.update, dict) and not _OURS.isdisjoint(result.update):
        return replace(result, update={key: value for key, value in result.update.items() if key not in _OURS})
    return result


class InThread:
    """A sync tool for an async run: in a daemon thread, not in the event loop's pool, which waits for it."""

    def __init__(self, tool: BaseTool) -> None:
        self.name = tool.name
        self._tool = tool

    async def ainvoke(self, call: Any, config: Any) -> Any:
        """Run the tool."""
        return await arun_in_thread(self._tool.invoke, call, config)


class InLoop:
    """An async-only tool (each MCP tool is one) for a sync run: in an event loop of its own."""

    def __init__(self, tool: BaseTool) -> None:
        self.name = tool.name
        self._tool = tool

    def invoke(self, call: Any, config: Any) -> Any:
        """Run the tool."""
        return run_async(self._tool.ainvoke, call, config)


class OutcomeBuffer:
    """Outcomes by turn, step and call; used by several threads at once.

    One waits no longer than the step of the tools takes, whatever the number of turns under way; a run that breaks
    off leaves its outcomes behind, so the number of turns has a bound.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: OrderedDict[str, dict[tuple[int, str], ToolOutcome]] = OrderedDict()
        self._offers: OrderedDict[str, tuple[Offer, SystemMessage | None]] = OrderedDict()
        self._failed: OrderedDict[str, None] = OrderedDict()

    def add(self, notes: Notes, outcome: ToolOutcome) -> None:
        """Keep an outcome; where middleware runs a call again, the last one counts."""
        with self._lock:
            self._turns.setdefault(notes["id"], {})[notes["step"], outcome.call_id] = outcome
            while len(self._turns) > _KEPT_TURNS:
                self._turns.popitem(last=False)

    def note_offer(self, notes: Notes, offer: Offer, system_prompt: SystemMessage | None) -> None:
        """What a model call of the turn reads beside its messages; of several sets of tools the largest counts."""
        with self._lock:
            known = self._offers.get(notes["id"])
            if known is None or len(known[0].every) < len(offer.every):
                self._offers[notes["id"]] = offer, system_prompt
            while len(self._offers) > _KEPT_TURNS:
                self._offers.popitem(last=False)

    def offered(self, notes: Notes) -> Offered:
        """The same, as far as it was seen in this process."""
        with self._lock:
            offer, system_prompt = self._offers.get(notes["id"], (None, None))
        return {"tools": offer.definitions if offer else (), "system_prompt": system_prompt}

    def forget(self, notes: Notes) -> None:
        """The turn has ended."""
        with self._lock:
            self._turns.pop(notes["id"], None)
            self._offers.pop(notes["id"], None)
            self._failed.pop(notes["id"], None)

    def fails_first(self, notes: Notes) -> bool:
        """True the first time that the turn is said to have failed: parallel calls may fail one by one."""
        with self._lock:
            first = notes["id"] not in self._failed
            self._failed[notes["id"]] = None
            while len(self._failed) > _KEPT_TURNS:
                self._failed.popitem(last=False)
            return first

    def results(self, notes: Notes, messages: Sequence[AnyMessage]) -> tuple[list[ToolOutcome], bool]:
        """The outcomes of the calls of the turn's last step, and whether all of them were refused by other code.

        Args:
            notes: on the turn.
            messages: the conversation; other code may have answered some of the calls.
        """
        with self._lock:
            kept = self._turns.get(notes["id"], {})
            ran = {call_id: outcome for (step, call_id), outcome in kept.items() if step == notes["step"]}
        sent = [call for call in notes["pending"] if "settled" not in call]
        if not sent and not ran:
            return [], False
        ids = {call["id"] for call in sent}
        replies = {m.tool_call_id: m for m in messages if isinstance(m, ToolMessage) and m.tool_call_id in ids}
        results = []
        for call in sent:
            message, outcome = replies.get(call["id"]), ran.pop(call["id"], None)
            if outcome is None:
                outcome = _unseen(call, message)
            elif message is not None and (text := text_of(message)) != outcome.content:
                # As other middleware has left it: what was taken out of the message stays out of the record.
                outcome = replace(outcome, content=text)
            results.append(outcome)
        # What is left are calls that other middleware has brought in.
        results += ran.values()
        return results, all(outcome.status == "blocked" for outcome in results)


def _unseen(call: PendingCall, message: ToolMessage | None) -> ToolOutcome:
    """The outcome of a call that did not run here.

    It may have run in another process, before an interrupt; or a person, or other code, has answered in its tool's
    place. What the model reads as a result counts as one, or a turn of such calls would have no end.
    """
    status: OutcomeStatus = "ok" if message is not None and message.status == "success" else "blocked"
    content = text_of(message) if message is not None else ""
    return ToolOutcome(call_id=call["id"], tool=call["name"], arguments=call["args"], status=status, content=content)


def _message_for(call: ToolCall, items: Sequence[Any]) -> ToolMessage | None:
    for item in items:
        found: Any = item
        if isinstance(item, Command):
            found = item.update.get("messages") if isinstance(item.update, dict) else None
        for message in found if isinstance(found, list) else [found]:
            if isinstance(message, ToolMessage) and message.tool_call_id == call["id"]:
                return message
    return None


def _leaves_the_graph(items: Sequence[Any]) -> bool:
    """A hand-over to a parent graph brings its own messages, if any."""
    return any(isinstance(item, Command) and item.graph == Command.PARENT for item in items)


def _lacks_its_own(error: Exception) -> bool:
    """True where LangGraph could not give a tool what it is to be given: the developer's to mend."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "_inject_tool_args"


def _is_invalid_resume(error: Exception) -> bool:
    """True for an answer to an interrupt that has the wrong form: the user's to correct, not the model's."""
    check = getattr(langgraph_errors, "is_invalid_resume", None)  # newer LangGraph versions only
    return check is not None and bool(check(error))
