"""`metis ask`: ask an agent in the terminal, and see what the gate decides as it decides it.

The answer goes to standard output, everything else to standard error, so the command can stand in a pipe.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from rich.console import Console
from rich.text import Text

from metis_agent.cli.agent_options import AgentOption, ModelOption, ToolsOption, choose_agent, named_gate
from metis_agent.cli.output import training_libraries
from metis_agent.errors import InfrastructureError, MetisError
from metis_agent.tools.search.base import cut
from metis_agent.types import ToolOutcome

if TYPE_CHECKING:
    from langgraph.pregel import Pregel

    from metis_agent.agent import MetisAgent
    from metis_agent.gates.base import Gate

__all__ = ["Conversation", "Screen", "answer_of", "ask_command"]

_STREAMS: Any = ["custom", "messages", "values"]


def ask_command(
    question: Annotated[
        str | None, typer.Argument(metavar="[QUESTION]", help="Without one: a conversation, or one line of input each.")
    ] = None,
    model: ModelOption = None,
    tools: ToolsOption = None,
    agent: AgentOption = None,
    gate: Annotated[
        str, typer.Option(help="Folder of a trained gate; or 'model' (it decides itself), 'always' or 'never'.")
    ] = "model",
    calls: Annotated[int, typer.Option(min=0, help="Tool calls that one answer may take.")] = 8,
    system_prompt: Annotated[str | None, typer.Option(help="Goes before the conversation.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Of the model's sampling; by default its own.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON an answer, with all that led to it.")] = False,
) -> None:
    """Ask an agent, and see each decision, call and result on the way to its answer.

    Without --model it is the tiny offline model that the package ships: it knows two-digit sums, capitals and greetings
    by heart, understands little else, and calls a tool all the same. A model without --tools gets the python tool.

    Example: metis ask "What is 4821 * 7310?"

    Example: metis ask "What is 21 + 34?" --gate never

    Example: metis ask --model openai:gpt-5 --tools my_tools.py:TOOLS --gate my-gate
    """
    tiny = model is None and agent is None
    if tiny:
        chosen: Pregel[Any, Any, Any, Any] = _almanac(named_gate(gate))
    else:
        named = tools or ([] if agent else ["metis_agent.cli.agent_options:python_tools"])
        choice = choose_agent(model, named, agent, system_prompt=system_prompt, calls=calls, temperature=temperature)
        chosen = choice.build(named_gate(gate))
    screen = Screen(as_json=json)
    talk = Conversation(chosen, screen, remembers=not tiny)
    if question is not None:
        talk.ask(question)
    elif sys.stdin.isatty():
        _converse(talk, screen, tiny=tiny)
    else:
        for line in sys.stdin:
            if line.strip():
                talk.ask(line.strip())


class Conversation:
    """The questions and answers so far, and the agent that is asked.

    Args:
        agent: is asked.
        screen: shows what happens.
        remembers: hand earlier questions and answers to the agent along with the next question.
    """

    def __init__(self, agent: Pregel[Any, Any, Any, Any], screen: Screen, *, remembers: bool = True) -> None:
        self._agent, self._screen, self._remembers = agent, screen, remembers
        self._messages: list[BaseMessage] = []

    def ask(self, question: str) -> str:
        """One turn; a turn that fails or is stopped leaves the conversation as it was.

        Raises:
            InfrastructureError: the model's service or a tool failed.
        """
        asked = [*self._messages, HumanMessage(question)]
        started = time.perf_counter()
        state: Mapping[str, Any] = {}
        self._screen.begin()
        try:
            for state in self._states(asked):
                self._screen.outcomes(state["outcomes"])
        except (MetisError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise InfrastructureError(
                f"The agent failed with {type(error).__name__}: {error}. Check the model's name, its key and the tools."
            ) from error
        self._screen.end(question, state, time.perf_counter() - started)
        if self._remembers:
            self._messages = list(state["messages"])
        return answer_of(state)

    def _states(self, messages: list[BaseMessage]) -> Iterator[Mapping[str, Any]]:
        mode: str
        chunk: Any
        for mode, chunk in self._agent.stream({"messages": messages}, stream_mode=_STREAMS):
            if mode == "values":
                yield chunk
            elif mode == "custom" and isinstance(chunk, Mapping) and chunk.get("type") == "metis_decision":
                self._screen.decision(chunk)
            elif mode == "messages" and isinstance(chunk[0], AIMessage):
                self._screen.text(str(chunk[0].text))


def _converse(talk: Conversation, screen: Screen, *, tiny: bool) -> None:
    """Ask what is typed until the end of input; Ctrl-C stops an answer, and at the prompt the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its history
    if tiny:
        from metis_agent.worlds.almanac.agent import EXAMPLES

        screen.note("A tiny model, offline. It understands questions such as: " + " | ".join(EXAMPLES))
    screen.note("Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.note("")
            return
        if not line:
            continue
        try:
            talk.ask(line)
        except KeyboardInterrupt:
            screen.note("\nStopped; the question is forgotten.")
        except MetisError as error:
            screen.note(f"{type(error).__name__}: {error}")


def _almanac(gate: Gate) -> MetisAgent:
    with training_libraries():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        from metis_agent.worlds.almanac.agent import almanac_agent
    return almanac_agent(gate)


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
