"""What `metis ask` shows: decisions and calls as notes, the answer as it comes, or a line of JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from metis_agent.tools.search.clean import cut
from metis_agent.types import ToolOutcome

__all__ = ["Screen", "answer_of"]

# What can move a terminal's cursor, colour it or set its title; and what turns text around.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_WIDTH = 100


def answer_of(state: Mapping[str, Any]) -> str:
    """The text of the last message."""
    return str(state["messages"][-1].text)


class Screen:
    """Shows one turn after another.

    Args:
        as_json: nothing but a line of JSON a turn.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self._json = as_json
        self._live = sys.stdout.isatty() and not as_json
        self._notes = Console(stderr=True, highlight=False, soft_wrap=True)
        self._shown = ""
        self._outcomes = 0

    def begin(self) -> None:
        """A turn begins."""
        self._shown, self._outcomes = "", 0

    def note(self, text: str) -> None:
        """Something about the turn, beside the answer."""
        if not self._json:
            self._notes.print(Text(_safe(text), style="dim"))

    def decision(self, decision: Mapping[str, Any]) -> None:
        """What the gate decided."""
        allowed = decision["allowed"]
        said = ("one of " if decision["required"] else "may call ") + ", ".join(allowed) if allowed else "answer"
        if (probabilities := decision["probabilities"]) is not None:
            said += "; " + ", ".join(f"p({name}) {p:.2f}" for name, p in probabilities.items())
            said += f", threshold {decision['threshold']:.2f}" if decision["threshold"] is not None else ""
        said += f"; {decision['reason']}" if decision["reason"] else ""
        self.note(f"  gate {decision['gate']}: {said}")

    def outcomes(self, outcomes: Sequence[ToolOutcome]) -> None:
        """The outcomes so far; those that were not shown yet are."""
        for outcome in outcomes[self._outcomes :]:
            self._break()
            arguments = ", ".join(f"{name}={value!r}" for name, value in outcome.arguments.items())
            content = cut(outcome.content, _WIDTH)
            call = f"{outcome.tool}({cut(arguments, _WIDTH)})"
            self.note(f"  {call} {outcome.status}, {outcome.seconds:.2f} s: {content}")
        self._outcomes = len(outcomes)

    def text(self, text: str) -> None:
        """A piece of what the model says."""
        if self._live and text:
            self._shown += text
            sys.stdout.write(_safe(text))
            sys.stdout.flush()

    def end(self, question: str, state: Mapping[str, Any], seconds: float) -> None:
        """The turn is over: the answer, where it has not been shown as it came."""
        answer = answer_of(state)
        outcomes: Sequence[ToolOutcome] = state["outcomes"]
        if self._json:
            line = {
                "question": question,
                "answer": answer,
                "decisions": [asdict(decision) for decision in state["decisions"]],
                "outcomes": [asdict(outcome) for outcome in outcomes],
                "seconds": seconds,
            }
            print(json.dumps(line, default=str), flush=True)
            return
        if self._shown.strip() != answer.strip():
            self._break()
            sys.stdout.write(_safe(answer))
        sys.stdout.write("\n")
        sys.stdout.flush()
        calls = sum(outcome.executed for outcome in outcomes)
        self.note(f"  {calls} tool call{'' if calls == 1 else 's'}, {seconds:.2f} s")

    def _break(self) -> None:
        """What the model says next begins on a line of its own."""
        if self._shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._shown = ""


def _safe(text: str) -> str:
    return _UNSAFE.sub("", text)
