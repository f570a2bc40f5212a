"""How answers are judged: the options of every command that scores runs, and the `Verify` that they ask for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from metis_agent.judging.verifiers import Verify
    from metis_agent.types import Question

__all__ = ["JudgeOption", "RubricOption", "VerifierOption", "check_verifiers", "verify_with"]

_PANEL = "Judging answers"

VerifierOption = Annotated[
    str | None,
    typer.Option(
        help="Judge every answer by this, whatever its question names: prose (finds the answer in a sentence), exact, "
        "numeric, choice, math, judge, or FILE.py:ATTRIBUTE for a function of your own (question, answer) -> bool.",
        rich_help_panel=_PANEL,
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="A chat model that judges the questions whose verifier is 'judge', as --model names one; with --verifier "
        "judge all of them.",
        rich_help_panel=_PANEL,
    ),
]
RubricOption = Annotated[
    Path | None,
    typer.Option(
        "--judge-rubric", help="A text file that tells the judge when an answer is right.", rich_help_panel=_PANEL
    ),
]


def verify_with(
    verifier: str | None, judge: str | None, rubric: Path | None = None, *, cache: Path | None = None
) -> Verify:
    """What judges an answer.

    Args:
        verifier: see `VerifierOption`.
        judge: see `JudgeOption`.
        rubric: see `RubricOption`.
        cache: file for the judge's verdicts, so that none is paid for twice; in memory by default.

    Raises:
        ConfigurationError: a verifier that is not known, or a judge asked for and none named.
    """
    from metis_agent.judging.verifiers import JUDGE, VERIFIERS, Verifier, verify

    verifiers: dict[str, Verifier] = dict(VERIFIERS)
    if judge is not None:
        from metis_agent.cli.agent_options import load_chat_model
        from metis_agent.judging.cache import DiskCache
        from metis_agent.judging.judge import AnswerJudge

        verifiers[JUDGE] = AnswerJudge(
            load_chat_model(judge, 0.0 if ".py:" not in judge else None),
            rubric="answer" if rubric is None else rubric,
            cache=DiskCache(cache),
        )
    elif rubric is not None:
        raise ConfigurationError(f"--judge-rubric {str(rubric)!r} goes with --judge MODEL.")
    if verifier is None:
        return partial(verify, verifiers=verifiers)
    if ":" in verifier:
        from metis_agent.cli.agent_options import load_attribute

        verifiers[verifier] = load_attribute(verifier)
    elif verifier not in verifiers:
        remedy = "name the model with --judge" if verifier == JUDGE else f"choose of {sorted(verifiers)!r}"
        raise ConfigurationError(f"--verifier {verifier!r} is not known here; {remedy}, or give FILE.py:ATTRIBUTE.")
    return partial(verify, verifiers=verifiers, name=verifier)


def check_verifiers(questions: Iterable[Question], verify: Verify) -> None:
    """Refuse, before any run is paid for, what could not be judged afterwards: one question of each verifier is tried.

    Raises:
        ConfigurationError: a verifier is not known, or no judge is named.
        MissingDependencyError: it needs an extra.
    """
    from metis_agent.judging.verifiers import JUDGE, VERIFIERS

    tried: set[str] = set()
    for question in questions:
        if question.verifier not in tried and question.answer is not None:
            tried.add(question.verifier)
            bound = getattr(verify, "keywords", {})
            if (bound.get("name") or question.verifier) != JUDGE or JUDGE not in bound.get("verifiers", VERIFIERS):
                verify(question, question.answer)
