"""One turn: its records in an agent's state, and what happens at each of its steps.

Written once, without input or output: steps are generators that yield what they want (a decision of the gate, a reply
of the model) and are sent it. The two hosts, and sync and async runs, differ in who gets it for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from langchain_core.messages import AIMessage, AnyMessage
from langgraph.errors import GraphBubbleUp
from langgraph.runtime import get_runtime
from langgraph.types import Overwrite

from metis_agent.recording.recorder import model_call_of
from metis_agent.rules.answers import ask_again, call_again, fallback_answer
from metis_agent.rules.asking import Ask, Reply, Settled, Step, may_refuse, with_written_call
from metis_agent.rules.budget import spending_of
from metis_agent.rules.enforcement import (
    NONE_COULD_RUN,
    fruitless_round,
    no_such_tool,
    plan_calls,
    progress_of,
    stripped,
)
from metis_agent.rules.outcomes import OutcomeBuffer, records_as_told
from metis_agent.rules.rules import Offer, Rules
from metis_agent.rules.shapes import (
    Ending,
    ending_of,
    from_provider,
    has_answer,
    joined,
    new_answer,
    open_calls,
    provider_calls,
    refusal_in,
    rewritten,
    without_calls,
    without_last_thoughts,
    without_words,
)  # fmt: skip
from metis_agent.rules.state import Notes, PendingCall, begins_anew, new_notes, with_question
from metis_agent.types import (
    TOKEN_RECORD,
    Draft,
    GateDecision,
    GateRequest,
    ModelCall,
    OutcomeStatus,
    Spending,
    ToolOutcome,
)  # fmt: skip

__all__ = ["Turn", "adrive", "decide", "drive", "respond"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_NOTABLE_SECONDS = 1e-3
_NOTHING_SPENT = Spending()


class Turn:
    """The turn so far, as one step sees it: what has been decided, spent and run, and what the step adds to state.

    Args:
        rules: the agent's.
        state: the agent's state.
        buffer: where the outcomes of the calls that ran are waiting, in a host whose tools do not write them to state.
        begins: a turn may begin here, where the run does.
    """

    def __init__(
        self, rules: Rules, state: Mapping[str, Any], buffer: OutcomeBuffer | None = None, *, begins: bool = True
    ) -> None:
        self.started = time.perf_counter()
        self.rules = rules
        self.state = state
        self.messages: Sequence[AnyMessage] = state.get("messages", ())
        self._buffer = buffer
        self.gate_seconds = 0.0
        self.calls: list[ModelCall] = []
        """Of this step, where they are kept."""
        self.ending: Ending = ""
        """How the model's latest reply ended."""
        self._left: Mapping[str, list[Any]] = {}
        """Of the turn's records, those that a person has made out of date since the last run, as they are now."""
        notes: Notes | None = state.get("metis_turn")
        self._run_begins = not state.get("metis_run")
        self.new = notes is None or (begins and self._run_begins and begins_anew(notes, self.messages))
        if notes is None or self.new:
            info = get_runtime().execution_info
            self.notes = new_notes(self.messages, None if info is None else info.task_id)
            self.decisions: list[GateDecision] = []
            self.outcomes: list[ToolOutcome] = []
            self._known_outcomes = self._known_decisions = 0
            return
        self.notes = notes
        if self._run_begins:
            self._left = records_as_told(state, self.messages)
        self.decisions, self.outcomes = list(state["decisions"]), list(self._left.get("outcomes", state["outcomes"]))
        self._known_outcomes, self._known_decisions = len(self.outcomes), len(self.decisions)
        if notes["pending"] or buffer is not None:
            self._take_results()

    def _take_results(self) -> None:
        """Take in what has become of the calls of the last step."""
        notes = self.notes
        if self._buffer is None:
            sent = {call["id"] for call in notes["pending"]}
            new, refused = [outcome for outcome in self.outcomes if outcome.call_id in sent], False
        else:
            new, refused = self._buffer.results(notes, self.messages)
            self.outcomes += new
        if not new:
            return
        changes: dict[str, Any] = {"pending": [], "step": notes["step"] + 1}
        changes["seconds"] = notes["seconds"] + max([outcome.seconds for outcome in new])
        if ran := [outcome for outcome in new if outcome.executed]:
            changes |= progress_of(notes, ran, self.messages)
        changes["refused"] = in_a_row = notes["refused"] + 1 if refused else 0
        if in_a_row >= 2:
            changes["loop"] = "all tool calls of the last two messages were refused"
            if all(call.get("added") for call in notes["pending"]):
                changes["loop"] = NONE_COULD_RUN
        self.change(**changes)

    def change(self, **fields: Any) -> None:
        """Change the notes."""
        notes: Any = {**self.notes, **fields}
        self.notes = notes

    @property
    def worked(self) -> float:
        """Time that the model has taken in this step: all of it but the gate's."""
        return max(0.0, time.perf_counter() - self.started - self.gate_seconds)

    @property
    def spent(self) -> Spending:
        """What the turn has spent."""
        if self.new and not self.decisions:
            return _NOTHING_SPENT
        seconds = self.notes["seconds"] + self.worked
        for decision in self.decisions:
            seconds += decision.seconds
        return spending_of(self.outcomes, seconds)

    def take_reply(self, reply: AIMessage | None, node: str, offer: Offer) -> None:
        """Note a reply as the model gave it, how it ended, and the calls in it that have run at the provider."""
        rules = self.rules
        if reply is None:
            self.ending = ""
            return
        if rules.name:
            reply.name = rules.name
        if rules.record_calls or (rules.record_calls is None and TOKEN_RECORD in reply.response_metadata):
            step = len(self.calls) + (0 if self.new else len(self.state.get("calls", ())))
            self.calls.append(model_call_of(reply, node, step))
        self.ending = ending_of(reply)
        for call in provider_calls(reply):
            status: OutcomeStatus = "error" if call.failed else "ok"
            tool = offer.named(call.tool, call.server)
            self.outcomes.append(ToolOutcome(call_id=call.id, tool=tool, arguments=call.arguments, status=status))

    def send(self, calls: list[PendingCall], *, polls: bool = False) -> None:
        """Note which calls go on to the tools, and whether some may bring the same again and again."""
        self.change(fruitless=0, pending=calls, polls=polls)

    def unsaid(self, reply: AIMessage) -> AIMessage:
        """A reply whose calls were answered at once, without its words, where other code does not get to see it.

        That code may be there to take names and addresses out of what the model says.
        """
        if self.calls and self.calls[-1].completion_ids is None:
            self.calls[-1] = replace(self.calls[-1], text="")
        return without_words(reply)

    def end(self, *said: AnyMessage | None) -> dict[str, Any]:
        """The turn has been answered: tell a gate that keeps count, and give what the step writes to state."""
        self.change(open=False)
        if self.rules.watched:
            messages, gate = (
                [*self.recorded()["messages"], *[message for message in said if message]],
                self.rules.gate.gate,
            )
            try:
                gate.after_turn(messages, self.decisions, self.outcomes)
            except Exception:
                logger.exception("Gate %s could not take note of a turn", gate.name)
        return self.update(*said)

    def update(self, *said: AnyMessage | None) -> dict[str, Any]:
        """What the step writes to state: the first one also clears what an earlier turn has left."""
        state = self.state
        update: dict[str, Any] = {"messages": [message for message in said if message]} if said else {}
        if self.new or len(self.decisions) > self._known_decisions:
            update["decisions"] = [dict(vars(decision)) for decision in self.decisions]
        if self._run_begins:
            update["metis_run"] = True
        update["metis_turn"] = {**self.notes, "seconds": self.notes["seconds"] + self.worked}
        for key, records in (("outcomes", self.outcomes[self._known_outcomes :]), ("calls", self.calls)):
            if self.new and state.get(key):
                update[key] = Overwrite([dict(vars(record)) for record in records])
            elif key in self._left:
                update[key] = Overwrite([dict(vars(record)) for record in [*self._left[key], *records]])
            elif records:
                update[key] = [dict(vars(record)) for record in records]
        return update

    def recorded(self) -> dict[str, Any]:
        """The state as there is to record of it."""
        return {
            "messages": with_question(self.state.get("messages", ()), self.notes["question"]),
            "decisions": self.decisions,
            "outcomes": self.outcomes,
            "calls": self.calls if self.new else [*self.state.get("calls", ()), *self.calls],
            # The time of the decisions is in them.
            "seconds": self.notes["seconds"] + self.worked,
        }


def drive(turn: Turn, step: Step[_T], ask: Callable[[Turn, Ask], Reply]) -> _T:
    """Run a step to its end; an error of `ask`, which asks the model, goes to the step, which may live with it."""
    try:
        wanted = next(step)
        while True:
            try:
                answer: Any = turn.rules.gate.decide(wanted) if isinstance(wanted, GateRequest) else ask(turn, wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


async def adrive(turn: Turn, step: Step[_T], ask: Callable[[Turn, Ask], Awaitable[Reply]]) -> _T:
    """`drive` without blocking the event loop."""
    try:
        wanted = next(step)
        while True:
            try:
                if isinstance(wanted, GateRequest):
                    answer: Any = await turn.rules.gate.adecide(wanted)
                else:
                    answer = await ask(turn, wanted)
            except Exception as error:
                wanted = step.throw(error)
            else:
                wanted = step.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result


def decide(turn: Turn, offer: Offer, *, watching: bool = False) -> Step[tuple[GateDecision, Reply | None]]:
    """The decision on a step, and the reply where a draft is the answer.

    Where the gate is only `watching`, it is asked whatever has been spent, and its draft is never the answer.
    """
    rules, spent = turn.rules, turn.spent
    if rules.counts_calls_only:
        tools = offer.specs if spent.calls < rules.budget.calls else ()
    else:
        tools = offer.within(rules.budget, spent)
    reply, failure = None, ""
    loop = turn.notes["loop"]
    decision = None if watching or (tools and not loop) else rules.forced(offer, spent, loop if tools else "")
    if decision is None:
        gate = rules.gate.gate
        if not turn.decisions and gate.wants_draft:
            reply, failure = yield from _draft(turn, offer)
        started = time.perf_counter()
        known = tools if offer.all_gated else tuple([tool for tool in tools if tool in offer.gated])
        if known or not tools:
            messages = turn.messages if turn.new else with_question(turn.messages, turn.notes["question"])
            kept = turn.notes["draft"]
            draft = None if kept is None else Draft(text=kept["text"], log_probs=tuple(kept["log_probs"]))
            decision = yield GateRequest(messages=messages, tools=known, spent=spent, draft=draft)
            seconds = time.perf_counter() - started
            if seconds > _NOTABLE_SECONDS and not decision.seconds:
                decision = replace(decision, seconds=seconds)
        else:
            reason = "the gate decides on none of these tools; the model does"
            decision = GateDecision(allowed=(), gate=gate.name, version=gate.version, reason=reason)
        if not offer.all_gated:
            decision = replace(decision, allowed=rules.allowed(decision.allowed, tools, known))
        if failure:
            decision = replace(decision, reason=f"{failure}; {decision.reason}" if decision.reason else failure)
    turn.decisions.append(decision)
    turn.gate_seconds += decision.seconds
    turn.notes = {**turn.notes, "open": True}
    return decision, None if decision.allowed or watching else reply


def _draft(turn: Turn, offer: Offer) -> Step[tuple[Reply | None, str]]:
    """Ask the model for a draft; a draft that fails is no draft: the gate decides without one.

    Some models have a setting for log-probabilities and refuse it; they are asked without from then on.
    """
    refused, again = turn.rules.refused, False
    while True:
        log_probs = not again and "logprobs" not in refused
        try:
            reply: Reply = yield Ask(node="draft", log_probs=log_probs)
            break
        except GraphBubbleUp:
            raise
        except Exception as error:
            if not log_probs or not may_refuse("logprob", error):
                return None, f"the direct draft failed with {type(error).__name__}: {error}"
            again = True
    if again:
        refused.add("logprobs")
    message = reply.message
    if message is None:
        return None, "the direct draft held no message of the model"
    draft = reply.as_draft(message)
    turn.take_reply(message, "draft", offer)
    if turn.calls and not turn.calls[-1].log_probs and draft.log_probs:
        turn.calls[-1] = replace(turn.calls[-1], log_probs=draft.log_probs)
    turn.change(draft={"text": draft.text, "log_probs": list(draft.log_probs)})
    return (reply if reply.ends_turn(without_calls(message, reply.answered)) else None), ""


def respond(
    turn: Turn, offer: Offer, decision: GateDecision, reply: Reply | None = None, *, structured: bool = False
) -> Step[Settled]:
    """Ask the model as the gate decided, unless there is a `reply`, and settle it: it ends the turn, or calls go on.

    Where the answer is to be `structured`, it has a format of its own.
    """
    if reply is None:
        node: Literal["act", "answer"] = "act" if decision.allowed else "answer"
        asked = Ask(node=node, allowed=decision.allowed, required=decision.required)
        reply = yield from _said(turn, offer, asked)
        if reply.message is not None and turn.ending == "paused":
            reply = yield from _resumed(turn, offer, decision, reply, reply.message)
        elif turn.ending == "slipped" and decision.allowed and reply.is_empty:
            reply = yield from _said(turn, offer, replace(asked, after=(call_again(),)))
    message, answered = reply.message, reply.answered
    if message is None:
        return Settled(reply=reply, message=None)
    calls = open_calls(message, answered) if answered else message.tool_calls or message.invalid_tool_calls
    done = bool(answered) or reply.structured is not None
    content = message.content
    as_given = _is_the_hosts(turn, offer, decision, message)
    if not calls and (done or (content.strip() if isinstance(content, str) else has_answer(message))):
        # Merged from a stream, it may hold bare strings among its blocks.
        whole = message if as_given or isinstance(content, str) else rewritten(message, open_calls(message))
        return Settled(reply=reply, message=whole)
    # Of a call that can't be read the model may be told by its id.
    named = message.tool_calls or any(call["id"] for call in message.invalid_tool_calls)
    if as_given and not (content or named or turn.outcomes or refusal_in(message) is not None):
        return Settled(reply=reply, message=message)
    # Without a tool on offer there was nothing to decide.
    closed = not decision.allowed and (offer.specs or not offer.open or bool(turn.notes["loop"]))
    if closed or not calls or (not done and refusal_in(message) is not None):
        return (yield from _answer(turn, offer, decision, reply, structured))
    ids, ran = turn.notes["latest"], [outcome for outcome in turn.outcomes if outcome.executed]
    plan = plan_calls(
        turn.rules, offer, message, decision,
        spent=turn.spent, outcomes=turn.outcomes, messages=turn.messages, answered=answered,
        cut=turn.ending == "length", as_given=as_given,
        # What has run at the provider since may have changed what they would bring, too.
        latest=[outcome for outcome in ran if outcome.call_id in ids] if ran and ran[-1].call_id in ids else [],
    )  # fmt: skip
    turn.outcomes += plan.outcomes
    if plan.run:
        pending = [PendingCall(id=call["id"] or "", name=call["name"], args=call["args"]) for [call] in plan.run]
        for sent in pending if offer.open else ():
            if sent["name"] not in offer.terms:
                sent["added"] = turn.rules.block(sent["name"], no_such_tool(offer))
        turn.send(pending, polls=any(name in offer.terms and offer.terms[name].repeatable for name in plan.tools))
    elif done:
        return Settled(reply=reply, message=without_calls(message, answered))
    else:
        turn.change(**fruitless_round(turn.notes, plan))
    return Settled(reply=reply, message=plan.message, plan=plan)


def _said(turn: Turn, offer: Offer, asked: Ask) -> Step[Reply]:
    """The reply to what a step asks, with the call in it that was required, also where it is written as text."""
    reply: Reply = yield asked
    if asked.required:
        reply = with_written_call(reply, offer.tools, asked.allowed)
    turn.take_reply(reply.message, asked.node, offer)
    return reply


def _is_the_hosts(turn: Turn, offer: Offer, decision: GateDecision, message: AIMessage) -> bool:
    """Whether a reply, which the agent would take as it is without a gate, was made by code and not by a provider.

    Where the gate leaves all to the model, in an agent that people keep, its own code may have meant it so.
    """
    return (
        offer.open
        and turn.rules.leaves_all
        and len(decision.allowed) == len(offer.specs)
        and not from_provider(message)
    )


def _resumed(turn: Turn, offer: Offer, decision: GateDecision, reply: Reply, message: AIMessage) -> Step[Reply]:
    """The reply with what follows where its provider has paused it in the middle of a search, within the budget."""
    node: Literal["act", "answer"] = "act" if decision.allowed else "answer"
    while turn.ending == "paused" and not turn.rules.budget.spent(turn.spent):
        reply = yield Ask(node=node, allowed=decision.allowed, after=(message,))
        if reply.message is None:
            return reply
        turn.take_reply(reply.message, node, offer)
        searched, message = provider_calls(reply.message), joined(message, reply.message)
        reply = replace(reply, message=message)
        if not searched:
            break
    return reply


def _answer(turn: Turn, offer: Offer, decision: GateDecision, reply: Reply, structured: bool) -> Step[Settled]:
    """End the turn with a reply, or with what stands in for it where it says nothing."""
    message, blocked = stripped(turn.rules, reply.message, reply.answered)
    turn.outcomes += blocked
    if not reply.ends_turn(message):
        after: tuple[AnyMessage, ...] = (ask_again(structured=structured),)
        kept = None if message is None else without_last_thoughts(message)
        if kept is not None and kept.content and provider_calls(kept) and ending_of(kept) != "paused":
            # What has been found at the provider is not lost.
            after = (kept, *after)
        reply = yield Ask(node="answer", after=after, again=True)
        turn.take_reply(reply.message, "answer", offer)
        message, blocked = stripped(turn.rules, reply.message, reply.answered)
        turn.outcomes += blocked
    if message is not None and not reply.says_something(message):
        refusal = refusal_in(message)
        if refusal is not None:
            message = new_answer(refusal, message, refusal=refusal)
        else:
            message = fallback_answer(message, "" if decision.allowed else decision.reason, turn.outcomes)
    return Settled(reply=reply, message=message)
