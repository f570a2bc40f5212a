"""Is an answer right? The verifiers that turn a trajectory's final message into r_ans.

First step of `verifiers -> rewards -> advantages -> loss`. Only the model's own final message is ever judged
(`Trajectory.answer`), never a tool's output, and no verifier is content with the reference somewhere *inside* the
answer: an answer that lists every candidate is wrong. Standard library only, but for `math`, which needs the extra
of that name.

A judge (`judging.judge.AnswerJudge`) slots in as one more: `verify(q, a, verifiers={**VERIFIERS, "judge": my_judge})`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.judging.mathematics import math
from metis_agent.judging.prose import prose
from metis_agent.judging.short_answers import choice, exact, numeric
from metis_agent.types import Question, Trajectory

__all__ = ["JUDGE", "VERIFIERS", "Verifier", "Verify", "judge", "judged", "register_verifier", "verify"]

_BATCH = 64

Verify = Callable[[Question, str], bool | None]
"""What judges an answer: `verify`, or that with other verifiers bound to it."""


class Verifier(Protocol):
    """Judges one answer."""

    def __call__(self, question: Question, answer: str) -> bool | None:
        """Say whether `answer`, the model's own final message, answers `question` rightly.

        Returns:
            `None` where it can't be judged, for instance without a reference answer.

        Raises:
            JudgeUnavailableError: The judge is down; the rollout is then excluded and counted, not scored.
        """
        ...


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "choice": choice, "math": math, "prose": prose}
"""The verifiers by the name that `Question.verifier` gives. One of your own joins them by `register_verifier`."""


def register_verifier(name: str, verifier: Verifier) -> None:
    """Make a verifier known by a name that questions can give.

    Raises:
        ConfigurationError: the name is taken by another, or is "judge", which stands for the judge that is named.
    """
    if name == JUDGE or VERIFIERS.get(name, verifier) is not verifier:
        raise ConfigurationError(f"The verifier {name!r} is there already; known are {sorted(VERIFIERS)!r}.")
    VERIFIERS[name] = verifier


JUDGE = "judge"
"""The verifier of questions that a model judges: there once one is named (`AnswerJudge`, `--judge`)."""


def verify(
    question: Question, answer: str, *, verifiers: Mapping[str, Verifier] = VERIFIERS, name: str | None = None
) -> bool | None:
    """Judge an answer with the verifier that its question names.

    Args:
        question: The question, its reference answer and the name of its verifier.
        answer: The model's own final message; an empty one is wrong.
        verifiers: By name; pass your own to add or replace one.
        name: Of the verifier to use, whatever the question names.

    Returns:
        True (right), False (wrong) or None (can't be judged).

    Raises:
        ConfigurationError: The question names a verifier that is not there.
        JudgeUnavailableError: From a judge that is down.
    """
    name = name or question.verifier
    if name not in verifiers:
        remedy = "Pass it in `verifiers`, register it (`register_verifier`), or change `Question.verifier`."
        if name == JUDGE:
            remedy = (
                "Name the model that judges: `--judge MODEL`, or `verifiers={**VERIFIERS, 'judge': AnswerJudge(m)}`."
            )
        raise ConfigurationError(
            f"Question {question.id!r} asks for the verifier {name!r}; known are {sorted(verifiers)!r}. {remedy}"
        )
    return verifiers[name](question, answer)


def judge(trajectory: Trajectory, verify: Verify = verify) -> tuple[bool | None, str]:
    """Judge one trajectory's final message.

    Returns:
        Right, wrong or `None` with the reason: "failed run", "judge unavailable" or "no reference".
    """
    if trajectory.status == "failed":
        return None, "failed run"
    try:
        right = verify(trajectory.question, trajectory.answer)
    except InfrastructureError:
        return None, "judge unavailable"
    return right, "" if right is not None else "no reference"


def judged(
    trajectories: Iterable[Trajectory], verify: Verify = verify
) -> Iterator[tuple[Trajectory, bool | None, str]]:
    """Each trajectory with what `judge` says of it, read in batches so that a judge is asked for many at once.

    Such a judge has a method `judge(answers: Sequence[tuple[Question, str]])` and keeps its verdicts, as
    `judging.judge.AnswerJudge` does.
    """
    remaining = iter(trajectories)
    while batch := list(islice(remaining, _BATCH)):
        _ask_ahead(batch, verify)
        for trajectory in batch:
            yield trajectory, *judge(trajectory, verify)


def _ask_ahead(batch: Sequence[Trajectory], verify: Verify) -> None:
    bound = getattr(verify, "keywords", {})
    verifiers: Mapping[str, Any] = bound.get("verifiers", VERIFIERS)
    asked: dict[int, tuple[Any, list[tuple[Question, str]]]] = {}
    for trajectory in batch:
        name = bound.get("name") or trajectory.question.verifier
        judge_of = verify if hasattr(verify, "judge") else verifiers.get(name)
        if hasattr(judge_of, "judge") and trajectory.status != "failed":
            asked.setdefault(id(judge_of), (judge_of, []))[1].append((trajectory.question, trajectory.answer))
    for judge_of, answers in asked.values():
        judge_of.judge(answers)
