"""What happens at one step of a turn: the gate decides, the model is asked, and its reply is settled.

Written once, without input or output: generators that yield what they want (a decision, a reply) and are sent it.
The two hosts, and sync and async runs, differ in who gets it for them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from langchain_core.messages import AIMessage, HumanMessage
from langgraph.errors import GraphBubbleUp

from metis_agent.gates.confidence import draft_of
from metis_agent.rules.answers import ask_again, fallback_answer, has_answer, open_calls, without_calls
from metis_agent.rules.enforcement import Plan, plan_calls
from metis_agent.rules.rules import Offer
from metis_agent.rules.turn import Turn, with_question
from metis_agent.types import GateDecision, GateRequest

__all__ = ["Ask", "Reply", "Settled", "Step", "adrive", "decide", "drive", "respond"]

_T = TypeVar("_T")
_LAST = "no tool can be called in the last answer of a turn"
_NOTABLE_SECONDS = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What the model is to be asked: to act with these tools, or to answer, or for a draft, without any."""

    node: Literal["draft", "act", "answer"]
    allowed: tuple[str, ...] = ()
    required: bool = False
    again: HumanMessage | None = None
    """Goes after the conversation, and does not stay in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the model said; behind `create_agent` with what LangChain has made of it."""

    message: AIMessage | None
    answered: frozenset[str] = frozenset()
    """Ids of calls that have their message already: structured answers."""
    structured: Any = None
    """The structured answer."""
    response: Any = None
    """The host's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """What becomes of a reply."""

    reply: Reply
    message: AIMessage | None
    """What goes into the conversation in its place."""
    plan: Plan | None = None
    """For its calls; `None` where the message ends the turn."""


Step = Generator["Ask | GateRequest", Any, _T]
"""Yields a `GateRequest` and is sent a `GateDecision`, or an `Ask` and is sent a `Reply`."""


def drive(turn: Turn, step: Step[_T], ask: Callable[[Ask], Reply]) -> _T:
    """Run a step to its end.

    Args:
        turn: the turn so far.
        step: the step.
        ask: asks the model; an error goes to the step, which may live with it.
    """
    try:
        wanted = next(step)
        while True:
            try:
                answer: Any = turn.rules.gate.decide(wanted) if isinstance(wanted, GateRequest) else ask(wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


async def adrive(turn: Turn, step: Step[_T], ask: Callable[[Ask], Awaitable[Reply]]) -> _T:
    """Run a step to its end without blocking the event loop."""
    try:
        wanted = next(step)
        while True:
            try:
                if isinstance(wanted, GateRequest):
                    answer: Any = await turn.rules.gate.adecide(wanted)
                else:
                    answer = await ask(wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


def decide(turn: Turn, offer: Offer, *, watching: bool = False) -> Step[tuple[GateDecision, Reply | None]]:
    """The decision on a step, and the reply where a draft is the answer.

    Args:
        turn: the turn so far.
        offer: the tools.
        watching: the gate is asked whatever has been spent, and its draft is never the answer.
    """
    rules, spent = turn.rules, turn.spent
    tools = offer.within(rules.budget, spent)
    forced = None if watching else _forced(turn, offer, bool(tools))
    if forced is not None:
        turn.take_decision(forced)
        return forced, None
    reply, failure = None, ""
    if not turn.decisions and rules.gate.gate.wants_draft:
        reply, failure = yield from _draft(turn)
    started = time.perf_counter()
    known = tools if len(offer.known) == len(offer.specs) else tuple([t for t in tools if t.name in offer.known])
    if known or not tools:
        messages = with_question(turn.messages, turn.notes["question"])
        decision: GateDecision = yield GateRequest(messages=messages, tools=known, spent=spent, draft=turn.draft)
        seconds = time.perf_counter() - started
        if seconds > _NOTABLE_SECONDS and not decision.seconds:
            decision = replace(decision, seconds=seconds)
    else:
        gate = rules.gate.gate
        reason = "the gate knows none of these tools; the model decides"
        decision = GateDecision(allowed=(), gate=gate.name, version=gate.version, reason=reason)
    if len(known) < len(tools):
        # What the gate does not know is the model's to decide.
        allowed = tuple([tool.name for tool in tools if tool.name in decision.allowed or tool.name not in offer.known])
        decision = replace(decision, allowed=allowed)
    if failure:
        decision = replace(decision, reason=f"{failure}; {decision.reason}" if decision.reason else failure)
    turn.take_decision(decision)
    return decision, reply if decision.direct and not watching else None


def _forced(turn: Turn, offer: Offer, tools_left: bool) -> GateDecision | None:
    """The decision where there is nothing to ask the gate."""
    if not tools_left:
        if not offer.specs:
            return GateDecision(allowed=(), gate="metis", reason="the agent has no tools")
        spent = turn.rules.budget.spent(turn.spent)
        return GateDecision(allowed=(), gate="budget", reason=spent or "the budget of every tool is spent")
    loop = turn.notes["loop"]
    return GateDecision(allowed=(), gate="loop guard", reason=loop) if loop else None


def _draft(turn: Turn) -> Step[tuple[Reply | None, str]]:
    """Ask the model for a draft; a draft that fails is no draft: the gate decides without one."""
    try:
        reply: Reply = yield Ask(node="draft")
    except GraphBubbleUp:
        raise
    except Exception as error:
        return None, f"the direct draft failed with {type(error).__name__}: {error}"
    if reply.message is None:
        return None, "the direct draft held no message of the model"
    draft = draft_of(reply.message)
    if not draft.text.strip() and reply.structured is not None and reply.message.tool_calls:
        draft = replace(draft, text=json.dumps(reply.message.tool_calls[0]["args"], default=str, ensure_ascii=False))
    turn.take_draft(reply.message, draft)
    says = _says_something(reply, without_calls(reply.message, reply.answered))
    return (reply if says else None), ""


def respond(turn: Turn, offer: Offer, decision: GateDecision, *, structured: bool = False) -> Step[Settled]:
    """Ask the model as the gate decided, and settle its reply.

    Args:
        turn: the turn so far.
        offer: the tools.
        decision: the gate's.
        structured: the answer has a format of its own.
    """
    node: Literal["act", "answer"] = "act" if decision.allowed else "answer"
    reply: Reply = yield Ask(node=node, allowed=decision.allowed, required=decision.required)
    if reply.message is not None:
        turn.take_reply(reply.message, node)
    return (yield from settle(turn, offer, decision, reply, structured=structured))


def settle(
    turn: Turn, offer: Offer, decision: GateDecision, reply: Reply, *, structured: bool = False
) -> Step[Settled]:
    """Settle a reply: it is the answer, or its calls are planned, or the model is asked once more for an answer."""
    message, answered = reply.message, reply.answered
    if message is None:
        return Settled(reply=reply, message=None)
    calls = open_calls(message, answered)
    done = bool(answered) or reply.structured is not None
    if not calls and (done or has_answer(message)):
        return Settled(reply=reply, message=message)
    if decision.direct or not calls:
        return (yield from _answer(turn, decision, reply, structured))
    open_ = message
    if answered:
        open_ = message.model_copy(update={"tool_calls": [c for c in message.tool_calls if c["id"] not in answered]})
    plan = plan_calls(
        turn.rules, offer, open_, decision, spent=turn.spent, outcomes=turn.outcomes, messages=turn.messages
    )
    turn.outcomes += plan.outcomes
    if plan.run:
        turn.send(plan.pending)
    elif done:
        return Settled(reply=reply, message=without_calls(message, answered))
    else:
        turn.take_fruitless_round(blocked=all(outcome.status == "blocked" for outcome in plan.outcomes))
    planned = plan.message
    if answered:
        first = [call for call in message.tool_calls if call["id"] in answered]
        planned = planned.model_copy(update={"tool_calls": [*first, *planned.tool_calls]})
    return Settled(reply=reply, message=planned, plan=plan)


def _answer(turn: Turn, decision: GateDecision, reply: Reply, structured: bool) -> Step[Settled]:
    """End the turn with a reply, or with what stands in for it where it says nothing."""
    message = _stripped(turn, reply)
    if not _says_something(reply, message):
        reply = yield Ask(node="answer", again=ask_again(structured=structured))
        if reply.message is not None:
            turn.take_reply(reply.message, "answer")
        message = _stripped(turn, reply)
    if message is not None and not _says_something(reply, message):
        message = fallback_answer(message, decision.reason if decision.direct else "", turn.outcomes)
    return Settled(reply=reply, message=message)


def _stripped(turn: Turn, reply: Reply) -> AIMessage | None:
    """The reply without the calls that wait for a result, each of them noted as blocked."""
    message = reply.message
    if message is None or not (calls := open_calls(message, reply.answered)):
        return message
    for call in calls:
        turn.take_blocked(call, _LAST)
    return without_calls(message, reply.answered)


def _says_something(reply: Reply, message: AIMessage | None) -> bool:
    return message is None or reply.structured is not None or bool(reply.answered) or has_answer(message)
