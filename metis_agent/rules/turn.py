"""The turn so far, as one step of it sees it: what has been decided, spent and run, and what the step adds to state.

Made anew at every step from the agent's state. Whether a new turn begins is settled here too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage
from langgraph.types import Overwrite

from metis_agent.recording.recorder import model_call_of
from metis_agent.rules.budget import NOTHING_SPENT, spending_of
from metis_agent.rules.outcomes import OutcomeBuffer
from metis_agent.rules.rules import Rules, current_task_id
from metis_agent.rules.state import Notes, PendingCall, as_dict, new_notes
from metis_agent.types import TOKEN_RECORD, Draft, GateDecision, ModelCall, Spending, ToolOutcome

__all__ = ["Turn", "with_question"]


class Turn:
    """The turn so far.

    Args:
        rules: the agent's.
        state: the agent's state.
        buffer: where the outcomes of the calls that ran are waiting, in a host whose tools do not write them to state.
    """

    def __init__(self, rules: Rules, state: Mapping[str, Any], buffer: OutcomeBuffer | None = None) -> None:
        self.started = time.perf_counter()
        self.rules = rules
        self.state = state
        self.messages: Sequence[AnyMessage] = state.get("messages", ())
        self._buffer = buffer
        self._gate_seconds = 0.0
        self.calls: list[ModelCall] = []
        """Of this step, where they are kept."""
        notes: Notes | None = state.get("metis_turn")
        self._run_begins = not state.get("metis_run")
        self.new = notes is None or (self._run_begins and _begins_anew(notes, self.messages))
        if notes is None or self.new:
            self.notes = new_notes(_question_in(self.messages), current_task_id())
            self.decisions: list[GateDecision] = []
            self.outcomes: list[ToolOutcome] = []
            self._known_outcomes = self._known_decisions = 0
            return
        self.notes = notes
        self.decisions, self.outcomes = list(state["decisions"]), list(state["outcomes"])
        self._known_outcomes, self._known_decisions = len(self.outcomes), len(self.decisions)
        if notes["pending"] or buffer is not None:
            self._take_results()

    def _take_results(self) -> None:
        """Take in what has become of the calls of the last step."""
        notes = self.notes
        sent = {call["id"] for call in notes["pending"] if "settled" not in call}
        if self._buffer is None:
            new = [outcome for outcome in self.outcomes if outcome.call_id in sent]
            if not new:
                return
            refused = False
        else:
            replies = {
                m.tool_call_id: m for m in self.messages if isinstance(m, ToolMessage) and m.tool_call_id in sent
            }
            new = self._buffer.results(notes, replies)
            if not new:
                return
            self.outcomes += new
            # A person may also answer in a tool's place: that leads somewhere.
            refused = all(outcome.status == "blocked" for outcome in new)
            refused = refused and all(message.status == "error" for message in replies.values())
        in_a_row = notes["refused"] + 1 if refused else 0
        slowest = 0.0
        for outcome in new:
            slowest = max(slowest, outcome.seconds)
        self._change(
            seconds=notes["seconds"] + slowest, pending=[], step=notes["step"] + 1, refused=in_a_row,
            loop="all tool calls of the last two messages were refused" if in_a_row >= 2 else notes["loop"],
        )  # fmt: skip

    def _change(self, **fields: Any) -> None:
        notes: Any = {**self.notes, **fields}
        self.notes = notes

    @property
    def draft(self) -> Draft | None:
        """The draft that was written at the turn's first step."""
        kept = self.notes["draft"]
        return None if kept is None else Draft(text=kept["text"], log_probs=tuple(kept["log_probs"]))

    @property
    def worked(self) -> float:
        """Time that the model has taken in this step: all of it but the gate's."""
        return max(0.0, time.perf_counter() - self.started - self._gate_seconds)

    @property
    def spent(self) -> Spending:
        """What the turn has spent."""
        if self.new and not self.decisions:
            return NOTHING_SPENT
        seconds = self.notes["seconds"] + self.worked
        for decision in self.decisions:
            seconds += decision.seconds
        return spending_of(self.outcomes, seconds)

    def take_decision(self, decision: GateDecision) -> None:
        """Note a decision."""
        self.decisions.append(decision)
        self._change(open=True)
        self._gate_seconds += decision.seconds

    def take_reply(self, reply: AIMessage, node: str) -> None:
        """Note a reply as the model gave it."""
        rules = self.rules
        if rules.name:
            reply.name = rules.name
        if rules.record_calls or (rules.record_calls is None and TOKEN_RECORD in reply.response_metadata):
            step = len(self.calls) + (0 if self.new else len(self.state.get("calls", ())))
            self.calls.append(model_call_of(reply, node, step))

    def take_draft(self, reply: AIMessage, draft: Draft) -> None:
        """Note a draft, and the log-probabilities that the gate reads of it."""
        kept = len(self.calls)
        self.take_reply(reply, "draft")
        if len(self.calls) > kept and not self.calls[-1].log_probs and draft.log_probs:
            self.calls[-1] = replace(self.calls[-1], log_probs=draft.log_probs)
        self._change(draft={"text": draft.text, "log_probs": list(draft.log_probs)})

    def take_blocked(self, call: Any, reason: str) -> None:
        """Note a call that was taken out of its reply."""
        call = call if isinstance(call, Mapping) else {}
        tool, arguments = call.get("name") or "unnamed", call.get("args")
        self.outcomes.append(
            ToolOutcome(
                call_id=call.get("id") or "", tool=tool, arguments=arguments if isinstance(arguments, dict) else {},
                status="blocked", content=self.rules.block(tool, reason),
            )
        )  # fmt: skip

    def end(self) -> None:
        """Note that the turn has been answered."""
        self._change(open=False)

    def send(self, calls: list[PendingCall]) -> None:
        """Note which calls go on to the tools."""
        self._change(pending=calls, maker=self._buffer.maker if self._buffer else "")

    def take_fruitless_round(self, *, blocked: bool) -> None:
        """Note a reply of which no call ran; one whose calls were all blocked is enough to end the turn."""
        fruitless, loop = self.notes["fruitless"] + 1, self.notes["loop"]
        if blocked:
            loop = "all tool calls of the last message were blocked"
        elif fruitless >= 2:
            loop = "the same tool calls were only repeated"
        self._change(fruitless=fruitless, loop=loop)

    def update(self) -> dict[str, Any]:
        """What the step writes to state: the first one also clears what an earlier turn has left."""
        state = self.state
        update: dict[str, Any] = {}
        if self.new or len(self.decisions) > self._known_decisions:
            update["decisions"] = [as_dict(decision) for decision in self.decisions]
        if self._run_begins:
            update["metis_run"] = True
        update["metis_turn"] = {**self.notes, "seconds": self.notes["seconds"] + self.worked}
        for key, records in (("outcomes", self.outcomes[self._known_outcomes :]), ("calls", self.calls)):
            if self.new and state.get(key):
                update[key] = Overwrite([as_dict(record) for record in records])
            elif records:
                update[key] = [as_dict(record) for record in records]
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


def with_question(messages: Sequence[AnyMessage], question: AnyMessage | None) -> Sequence[AnyMessage]:
    """The conversation with the turn's question as its last human message, whatever has been added or summarised since.

    Other human messages after the question are left out, or all where it had gone.
    """
    if question is None:
        return messages
    place = last = None
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].type == "human":
            last = index if last is None else last
            if messages[index].id == question.id:
                place = index
                break
    if place is not None and place == last:
        return messages
    before, after = (messages[:place], messages[place + 1 :]) if place is not None else ([], messages)
    return [*before, question, *(message for message in after if message.type != "human")]


def _begins_anew(notes: Notes, messages: Sequence[AnyMessage]) -> bool:
    """Whether a run that has just begun is a turn of its own, by the notes that an earlier run has left.

    Where that one stopped before the turn was answered, this one goes on from there, unless it brings a new question.
    """
    if not notes["open"] or not messages:
        return True
    last, question = messages[-1], notes["question"]
    if last.type != "human" or (question is not None and last.id == question.id):
        return False
    answered = {message.tool_call_id for message in messages if isinstance(message, ToolMessage)}
    return not notes["pending"] or any(call["id"] not in answered for call in notes["pending"])


def _question_in(messages: Sequence[AnyMessage]) -> AnyMessage | None:
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].type == "human":
            return messages[index]
    return None
