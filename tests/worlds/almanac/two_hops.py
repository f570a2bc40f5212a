"""Runs of the almanac's agent that never has enough, made without a graph: what it does, and what it would have said.

`tests/cli/test_every_step.py` makes the same runs for real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from metis_agent.gates.reading import observed
from metis_agent.judging.verifiers import verify
from metis_agent.rollouts.outcomes import OutcomeTable
from metis_agent.types import Question
from metis_agent.worlds.almanac.agent import SeekingModel
from metis_agent.worlds.almanac.facts import linked_entries
from metis_agent.worlds.almanac.questions import CALLS_NEEDED, Kind, Split, questions

MODEL = SeekingModel()


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run."""

    id: str
    question: str
    brought: tuple[tuple[str, str, bool], ...]
    """What each of its K calls brought."""
    verdicts: tuple[bool, ...]
    """a_0 .. a_K."""
    needed: int
    """Calls after which it has enough."""


def record(question: Question) -> Run:
    """One run, and at each of its states what the model says if it has to answer."""
    messages: list[BaseMessage] = [HumanMessage(question.text)]
    verdicts = []
    while True:
        verdicts.append(bool(verify(question, said(messages).text)))
        reply = said(messages, tools=["text_search"])
        if not reply.tool_calls:
            break
        call = reply.tool_calls[0]
        found = linked_entries().get(call["args"]["query"], "No results.")
        messages += [reply, ToolMessage(found, tool_call_id=call["id"], name=call["name"])]
    return Run(
        id=question.id,
        question=question.text,
        brought=tuple(("text_search", str(it.text), False) for it in messages if isinstance(it, ToolMessage)),
        verdicts=tuple(verdicts),
        needed=CALLS_NEEDED[cast(Kind, question.kind)],
    )


def said(messages: list[BaseMessage], **options: object) -> AIMessage:
    """What the model replies."""
    return cast(AIMessage, MODEL._generate(messages, **options).generations[0].message)


def records(split: Split, count: int, seed: int) -> list[Run]:
    """So many runs, each of another question."""
    return [record(question) for question in questions(split, count, seed=seed, kinds=tuple(CALLS_NEEDED))]


def decision_points(runs: list[Run]) -> OutcomeTable:
    """Their states but the last: what stopping gave, what going on gave, and what was left to pay for."""
    rows = [(run, k) for run in runs for k in range(len(run.brought))]
    return OutcomeTable(
        questions=tuple(run.question for run, _ in rows),
        actions=("direct", "text_search"),
        correct=np.array([[run.verdicts[k], run.verdicts[-1]] for run, k in rows], dtype=float),
        cost=np.array([[0.0, len(run.brought) - k] for run, k in rows]),
        seconds=np.full((len(rows), 2), np.nan),
        runs=tuple(run.id for run, _ in rows),
        observations=tuple(observed(run.brought[:k]) for run, k in rows),
    )
