"""What a step of a turn asks for, and asking a gate: within its time, and with the model's choice where it fails.

Both hosts ask here, so that a failing gate means the same thing everywhere: the model decides, and the decision says
why. A gate that fails again and again is left alone for a while: a hung one would leave a thread behind each time.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NotRequired, TypeVar

from langchain_core.messages import AIMessage, AnyMessage, ToolCall, ToolMessage
from langchain_core.tools import BaseTool
from langgraph.errors import GraphBubbleUp
from pydantic import BaseModel

from metis_agent.deadline import DeadlineError, NotCalledError, arun_within, run_within
from metis_agent.gates.base import Gate, offered_only
from metis_agent.gates.reference import AlwaysGate, ModelGate, NeverGate, draft_of
from metis_agent.messages import bare_calls, blocks_of, new_call_id
from metis_agent.rules.shapes import has_answer, open_calls, refusal_in
from metis_agent.types import Draft, GateDecision, GateRequest, ToolOutcome

__all__ = [
    "Ask",
    "AskedGate",
    "Plan",
    "Reply",
    "SentCall",
    "Settled",
    "Step",
    "may_refuse",
    "no_tools_choice",
    "with_written_call",
]

logger = logging.getLogger(__name__)

_MODEL = ModelGate()
_FAILURES = 5
_PAUSE = 30.0
_LONGEST_PAUSE = 3600.0
_NO_TOOLS: Mapping[str, Any] = {
    "ChatAnthropic": {"type": "none"},
    **dict.fromkeys(("BaseChatOpenAI", "ChatGoogleGenerativeAI", "ChatMistralAI", "ChatGroq", "ChatFireworks"), "none"),
}
"""What forbids calls of the tools on offer, by the name of the client's class or of one that it derives from."""


_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the model is to be asked: to act with these tools, or to answer, or for a draft, without any."""

    node: Literal["draft", "act", "answer"]
    allowed: tuple[str, ...] = ()
    required: bool = False
    after: tuple[AnyMessage, ...] = ()
    """Goes after the conversation, and does not stay in it."""
    again: bool = False
    """It was asked to answer before, and said nothing; a client that can't forbid calls is offered no tools now."""
    log_probs: bool = False
    """Ask for log-probabilities, where the model has that setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the model said; behind `create_agent` with what LangChain has made of it."""

    message: AIMessage | None
    answered: frozenset[str] = frozenset()
    """Ids of calls that have their message already: structured answers."""
    structured: Any = None
    """The structured answer."""
    beside: tuple[ToolMessage, ...] = ()
    """Messages that answer these calls, where they go into the conversation with the reply."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """What else goes to state with it."""
    response: Any = None
    """The host's own."""

    @property
    def is_empty(self) -> bool:
        """Whether the model has neither said anything nor called a tool."""
        return not (self.ends_turn(self.message) or (self.message and open_calls(self.message)))

    def as_draft(self, message: AIMessage) -> Draft:
        """The draft that the reply is; a structured answer counts by what it holds."""
        draft = draft_of(message)
        if draft.text.strip() or self.structured is None or not message.tool_calls:
            return draft
        return replace(draft, text=json.dumps(message.tool_calls[0]["args"], default=str, ensure_ascii=False))

    def says_something(self, message: AIMessage | None) -> bool:
        """Whether there is an answer in the message that is left of the reply."""
        return message is None or self.structured is not None or bool(self.answered) or has_answer(message)

    def ends_turn(self, message: AIMessage | None) -> bool:
        """Whether there is nothing to ask for again: a refusal is an answer too, of its own kind."""
        return self.says_something(message) or (message is not None and refusal_in(message) is not None)


class SentCall(ToolCall):
    """A call on its way to its tool."""

    seconds_left: NotRequired[float]
    """What is left of the budget's time, where that is limited."""


@dataclass(kw_only=True)
class Plan:
    """What becomes of the calls of one reply."""

    message: AIMessage
    """The reply, with an id for every call."""
    run: list[list[SentCall]] = field(default_factory=list)
    """Calls to send to their tools, each by itself."""
    tools: list[str] = field(default_factory=list)
    """Names of these tools."""
    replies: list[ToolMessage] = field(default_factory=list)
    """For the calls that are settled already."""
    outcomes: list[ToolOutcome] = field(default_factory=list)
    """Of the same."""
    slipped: bool = False
    """A call could not be read, or named no tool: the model may correct it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What becomes of a reply."""

    reply: Reply
    message: AIMessage | None
    """What goes into the conversation in its place."""
    plan: Plan | None = None
    """For its calls; `None` where the message ends the turn."""

    @property
    def fails_format(self) -> bool:
        """Whether the model was told that its answer does not have the format, and may mend it."""
        return self.plan is None and bool(self.reply.beside) and self.reply.structured is None


Step = Generator["Ask | GateRequest", Any, _T]
"""Yields a `GateRequest` and is sent a `GateDecision`, or an `Ask` and is sent a `Reply`."""


def no_tools_choice(model: Any) -> Any:
    """The `tool_choice` that forbids all calls of the tools on offer; `None` where the client has none."""
    return next((_NO_TOOLS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _NO_TOOLS), None)


def may_refuse(setting: str, error: Exception) -> bool:
    """Whether an error may mean that the model does not take a setting: it names it, or the request was a bad one.

    Gateways and servers have no words in common for that, and many have none at all.
    """
    status = getattr(error, "status_code", getattr(error, "code", None))
    return setting in str(error).lower() or status in (400, 422)


def with_written_call(reply: Reply, tools: Sequence[Any], allowed: Collection[str]) -> Reply:
    """The reply with the call that was required, where its whole text is the JSON of one.

    Servers such as llama.cpp's do not hold a model to `tool_choice`, and a small model then writes its call as text.

    Args:
        reply: to a request in which a call was required.
        tools: what was on offer.
        allowed: names of those that may be called.
    """
    message = reply.message
    if message is None or reply.structured is not None or open_calls(message):
        return reply
    if any(block.get("type") != "text" for block in blocks_of(message)):
        return reply
    valid, invalid = bare_calls(str(message.text), allowed)
    fitting = [
        ToolCall(name=call["name"], args=call["args"], id=new_call_id(), type="tool_call")
        for call in valid
        if any(isinstance(tool, BaseTool) and tool.name == call["name"] and _fits(call["args"], tool) for tool in tools)
    ]
    if invalid or len(valid) != 1 or not fitting:
        return reply
    content: Any = "" if isinstance(message.content, str) else []
    return replace(reply, message=message.model_copy(update={"content": content, "tool_calls": fitting}))


def _fits(arguments: Mapping[str, Any], tool: BaseTool) -> bool:
    schema = tool.tool_call_schema
    if isinstance(schema, dict):
        return set(schema.get("required", ())) <= arguments.keys()
    if not issubclass(schema, BaseModel):
        return False
    try:
        schema.model_validate(arguments)
    except Exception:  # a schema may check with code of its own
        return False
    return True


class AskedGate:
    """A gate whose failures are decisions: it never raises, and it never takes longer than its time.

    After five failures in a row the gate is not asked for half a minute, then once; if that fails too, the pause
    doubles, up to an hour.

    Args:
        gate: what decides.
        limit: seconds for a decision; `None` for no limit.
    """

    def __init__(self, gate: Gate, limit: float | None = None) -> None:
        self.gate = gate
        self.limit = limit
        # What these decide needs no check.
        self._is_ours = type(gate) in (ModelGate, NeverGate, AlwaysGate)
        self._failures = 0
        self._pause_until = 0.0

    def decide(self, request: GateRequest) -> GateDecision:
        """The gate's decision, or the model's where the gate fails or takes too long."""
        if self._failures >= _FAILURES and self._resting():
            return self._fall_back(request, None)
        gate, limit = self.gate, self.limit
        try:
            decision = gate.decide(request) if limit is None else run_within(limit, gate.decide, request, of=gate)
            if not self._is_ours:
                decision = offered_only(decision, request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return self._fall_back(request, error)
        self._failures = 0
        return decision

    async def adecide(self, request: GateRequest) -> GateDecision:
        """`decide` without blocking the event loop."""
        if self._failures >= _FAILURES and self._resting():
            return self._fall_back(request, None)
        try:
            deciding = self.gate.adecide(request)
            decision = await (deciding if self.limit is None else arun_within(self.limit, deciding, of=self.gate))
            decision = offered_only(decision, request)
        except GraphBubbleUp:
            raise
        except Exception as error:
            return self._fall_back(request, error)
        self._failures = 0
        return decision

    def _resting(self) -> bool:
        """True while the gate is left alone; at the end of a pause one caller is let through."""
        now = time.monotonic()
        if now < self._pause_until:
            return True
        self._pause_until = now + _PAUSE
        return False

    def _fall_back(self, request: GateRequest, error: Exception | None) -> GateDecision:
        gate = self.gate
        name = gate.name or type(gate).__name__
        if error is None:
            what = f"the gate failed {self._failures} times in a row and is left alone for a while"
        elif isinstance(error, NotCalledError):
            what = f"of the gate {error}"
        elif isinstance(error, DeadlineError):
            what = f"the gate did not decide within {self.limit:g} seconds"
        else:
            what = f"the gate failed with {type(error).__name__}: {error}"
        if error is not None:
            self._failures += 1
            if self._failures >= _FAILURES:
                pause = min(_LONGEST_PAUSE, _PAUSE * 2 ** min(self._failures - _FAILURES, 10))
                self._pause_until = time.monotonic() + pause
        reason = f"{what}; the model decides"
        if error is not None:
            logger.warning("Gate %s: %s", name, reason)
        return replace(_MODEL.decide(request), gate=name, version=gate.version, reason=reason)
