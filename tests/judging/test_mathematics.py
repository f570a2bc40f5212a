"""Mathematical answers in whatever form, from whoever wrote them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from metis_agent.judging.mathematics import MathVerifier
from metis_agent.types import Question

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    verifier = MathVerifier(seconds=20.0)
    yield verifier
    verifier.close()


def question(reference: str | None) -> Question:
    return Question(id="q", text="?", answer=reference, verifier="math")


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\boxed{\frac{2}{4}}"),
        ("x^2 - 1", "$(x-1)(x+1)$"),
        (r"\{1, 2\}", r"$\{2, 1\}$"),
        ("12", "So the answer is $12$."),
    ],
)
def test_equal_in_another_form_is_right(verifier: MathVerifier, reference: str, answer: str) -> None:
    assert verifier(question(reference), answer) is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{1}{3}"),
        ("12", ""),
        ("12", "I do not know."),
        ("12", r"\boxed{11} or \boxed{12}"),
        ("12", "It is 11 or 12"),
        ("12", "11, 12"),
    ],
)
def test_another_value_or_several_is_wrong(verifier: MathVerifier, reference: str, answer: str) -> None:
    assert verifier(question(reference), answer) is False


@pytest.mark.parametrize("reference", [None, "", "the capital of France"])
def test_without_a_reference_that_is_mathematics_there_is_no_verdict(
    verifier: MathVerifier, reference: str | None
) -> None:
    assert verifier(question(reference), "12") is None


def test_an_answer_that_would_take_for_ever_is_wrong_in_time_and_the_next_is_judged() -> None:
    verifier = MathVerifier(seconds=3.0)
    try:
        started = time.monotonic()
        assert verifier(question("12"), "$9^{9^{9^{9}}}$") is False
        assert time.monotonic() - started < 60
        assert verifier(question("12"), "12") is True
    finally:
        verifier.close()
