"""One step's view of the turn: what has been decided, spent and run so far, and what the step adds to state."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from langchain_core.messages import AIMessage, AnyMessage, ToolMessage

from metis_agent.budget import spending_of
from metis_agent.graphs.records import as_dict
from metis_agent.middleware.ledger import Ledger
from metis_agent.middleware.state import PendingCall, Turn, turn_in
from metis_agent.recording.recorder import model_call_of
from metis_agent.types import TOKEN_RECORD, Draft, GateDecision, ModelCall, Spending, ToolOutcome

__all__ = ["TurnView", "with_question"]


class TurnView:
    """The turn so far.

    Args:
        state: the agent's state.
        ledger: where the outcomes of the calls that ran are waiting.
        record_calls: keep model calls; `None`: where the model leaves token records.
    """

    def __init__(self, state: Mapping[str, Any], ledger: Ledger, *, record_calls: bool | None = None) -> None:
        self._started = time.perf_counter()
        self._state = state
        self._ledger = ledger
        self._record_calls = record_calls
        self.turn: Turn = turn_in(state)
        self.decisions: list[GateDecision] = list(state["decisions"])
        self.outcomes: list[ToolOutcome] = list(state["outcomes"])
        self._calls: list[ModelCall] = []
        self._known = len(self.outcomes)
        self._take_results(state["messages"])

    def _take_results(self, messages: Sequence[AnyMessage]) -> None:
        """Settle the calls of the last step."""
        turn = self.turn
        sent = {call["id"] for call in turn["pending"] if "settled" not in call}
        replies = {m.tool_call_id: m for m in messages if isinstance(m, ToolMessage) and m.tool_call_id in sent}
        new = self._ledger.results(turn, replies)
        if not new:
            return
        self.outcomes += new
        refused = all(outcome.status == "blocked" for outcome in new)
        # A person may also answer in a tool's place: that leads somewhere.
        refused = refused and all(message.status == "error" for message in replies.values())
        self._change(
            seconds=turn["seconds"] + max([outcome.seconds for outcome in new], default=0.0),
            pending=[],
            step=turn["step"] + 1,
            refused=turn["refused"] + 1 if refused else 0,
        )

    def _change(self, **fields: Any) -> None:
        self.turn = cast(Turn, {**self.turn, **fields})

    @property
    def draft(self) -> Draft | None:
        """The draft that was written at the turn's first step."""
        kept = self.turn["draft"]
        return None if kept is None else Draft(text=kept["text"], log_probs=tuple(kept["log_probs"]))

    @property
    def seconds(self) -> float:
        """Time that the turn has been at work, without waiting at interrupts."""
        return self.turn["seconds"] + self._worked + sum(decision.seconds for decision in self.decisions)

    @property
    def _worked(self) -> float:
        """Time that the model has taken in this step: all of it but the gate's."""
        decided = sum(decision.seconds for decision in self.decisions[len(self._state["decisions"]) :])
        return max(0.0, time.perf_counter() - self._started - decided)

    @property
    def spent(self) -> Spending:
        """What the turn has spent."""
        return spending_of(self.outcomes, self.seconds)

    def stuck(self) -> str | None:
        """Why the turn has to end now; `None` where it still leads somewhere."""
        if self.turn["fruitless"] >= 2:
            return "the same tool calls were only repeated"
        if self.turn["refused"] >= 2:
            return "all tool calls of the last two messages were refused"
        return None

    def take_reply(self, reply: AIMessage, node: str) -> None:
        """Note a reply as the model gave it."""
        if self._record_calls or (self._record_calls is None and TOKEN_RECORD in reply.response_metadata):
            step = len(self._state["calls"]) + len(self._calls)
            self._calls.append(model_call_of(reply, node, step))

    def take_draft(self, reply: AIMessage, draft: Draft) -> None:
        """Note a draft, and the log-probabilities that the gate reads of it."""
        kept = len(self._calls)
        self.take_reply(reply, "draft")
        if len(self._calls) > kept and not self._calls[-1].log_probs and draft.log_probs:
            self._calls[-1] = replace(self._calls[-1], log_probs=draft.log_probs)
        self._change(draft={"text": draft.text, "log_probs": list(draft.log_probs)})

    def take_outcomes(self, outcomes: Iterable[ToolOutcome]) -> None:
        """Note what has become of calls that do not run."""
        self.outcomes += outcomes

    def send(self, calls: list[PendingCall]) -> None:
        """Note which calls go on to the tools."""
        self._change(pending=calls, maker=self._ledger.maker)

    def take_fruitless_round(self, *, blocked: bool) -> None:
        """Note a reply of which no call ran; one whose calls were all blocked is enough to end the turn."""
        self._change(fruitless=2 if blocked else self.turn["fruitless"] + 1)

    def update(self) -> dict[str, Any]:
        """What the step writes to state."""
        update: dict[str, Any] = {
            "decisions": [as_dict(decision) for decision in self.decisions],
            "metis_turn": {**self.turn, "seconds": self.turn["seconds"] + self._worked},
        }
        if len(self.outcomes) > self._known:
            update["outcomes"] = [as_dict(outcome) for outcome in self.outcomes[self._known :]]
        if self._calls:
            update["calls"] = [as_dict(call) for call in self._calls]
        return update

    def recorded(self) -> dict[str, Any]:
        """The state as there is to record of it."""
        return {
            "messages": with_question(self._state["messages"], self.turn["question"], alone=True),
            "decisions": self.decisions,
            "outcomes": self.outcomes,
            "calls": [*self._state["calls"], *self._calls],
            # What `seconds_of` adds the decisions to.
            "seconds": self.turn["seconds"],
        }


def with_question(
    messages: Sequence[AnyMessage], question: AnyMessage | None, *, alone: bool = False
) -> Sequence[AnyMessage]:
    """The conversation with the turn's question as its last human message, whatever other middleware has made of it.

    Args:
        messages: the conversation: perhaps summarised, or with reminders in it.
        question: what opened the turn.
        alone: leave out other human messages from the question on, or all where it had gone.
    """
    if question is None:
        return messages
    place = next((i for i, message in enumerate(messages) if message.id == question.id), None)
    human = [i for i, message in enumerate(messages) if message.type == "human"]
    if place is not None and human[-1:] == [place]:
        return messages
    if alone:
        before, after = (messages[:place], messages[place + 1 :]) if place is not None else ([], messages)
        return [*before, question, *(message for message in after if message.type != "human")]
    if place is not None:
        return messages
    last = human[-1] + 1 if human else 0
    return [*messages[:last], question, *messages[last:]]
