"""What became of the calls that ran, from the moment that a tool returns until the next step takes it to state.

A tool's result passes through other middleware on its way out, which may look for a plain `ToolMessage`; so the
result stays as the tool gave it, and its outcome waits here. The wait spans no more than the step of the tools,
and a run that breaks off leaves its outcomes behind: so only those of the latest turns are kept.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from langchain_core.messages import ToolMessage

from metis_agent.graphs.enforcement import SentCall
from metis_agent.graphs.tool_results import update_of
from metis_agent.middleware.state import PendingCall, Turn
from metis_agent.types import OutcomeStatus, ToolOutcome

__all__ = ["Ledger", "outcome_of"]

_KEPT_TURNS = 1_000


class Ledger:
    """Outcomes by turn, step and call; used by several threads at once."""

    def __init__(self) -> None:
        self.maker = uuid.uuid4().hex
        """Tells this ledger from that of another process, in which an interrupted turn may have begun."""
        self._lock = threading.Lock()
        self._turns: OrderedDict[str, dict[tuple[int, str], ToolOutcome]] = OrderedDict()
        self._failed: OrderedDict[str, None] = OrderedDict()

    def add(self, turn: Turn, outcome: ToolOutcome) -> None:
        """Keep an outcome; where middleware runs a call again, the last one counts."""
        with self._lock:
            self._turns.setdefault(turn["id"], {})[turn["step"], outcome.call_id] = outcome
            while len(self._turns) > _KEPT_TURNS:
                self._turns.popitem(last=False)

    def forget(self, turn: Turn) -> None:
        """The turn has ended."""
        with self._lock:
            self._turns.pop(turn["id"], None)

    def fails_first(self, turn: Turn) -> bool:
        """True the first time that the turn is said to have failed: parallel calls may fail one by one."""
        with self._lock:
            first = turn["id"] not in self._failed
            self._failed[turn["id"]] = None
            while len(self._failed) > _KEPT_TURNS:
                self._failed.popitem(last=False)
            return first

    def results(self, turn: Turn, messages: Mapping[str, ToolMessage]) -> list[ToolOutcome]:
        """The outcomes of the calls of the turn's last step, also of those that somebody else has answered.

        Args:
            turn: notes on the turn.
            messages: what there is of the calls' messages, by id.
        """
        with self._lock:
            kept = dict(self._turns.get(turn["id"], {}))
        ran = {call_id: outcome for (step, call_id), outcome in kept.items() if step == turn["step"]}
        sent = [call for call in turn["pending"] if "settled" not in call]
        results = []
        for call in sent:
            seen = call["id"] in ran
            results.append(ran.pop(call["id"]) if seen else self._unseen(turn, call, messages.get(call["id"])))
        # What is left are calls that other middleware has brought in.
        return [*results, *ran.values()]

    def _unseen(self, turn: Turn, call: PendingCall, message: ToolMessage | None) -> ToolOutcome:
        """The outcome of a call that did not run here."""
        status: OutcomeStatus = "blocked"
        # Of parallel calls, some may have run before an interrupt, and another process has gone on from there.
        if turn["maker"] != self.maker and message is not None and message.status == "success":
            status = "ok"
        content = str(message.text) if message is not None else ""
        return ToolOutcome(
            call_id=call["id"], tool=call["name"], arguments=call["args"], status=status, content=content
        )


def outcome_of(
    call: Any, result: Any, *, seconds: float, cost: float, status: OutcomeStatus | None = None
) -> ToolOutcome:
    """The outcome of a call that ran.

    Args:
        call: LangChain's tool call.
        result: what the tool returned: a message, a command, or a list of them.
        seconds: duration.
        cost: declared price.
        status: the outcome's; by default that of the message in the result.
    """
    sent = SentCall(name=call["name"], args=call["args"], id=call["id"], type="tool_call")
    update: Any = update_of(sent, result, status, seconds=seconds, cost=cost)[0].update
    return ToolOutcome(**update["outcomes"][0])
