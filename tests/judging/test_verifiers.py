"""What is right, what is wrong, what can't be judged; the rows are dressings that models use."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, JudgeUnavailableError
from metis_agent.judging.short_answers import normalise
from metis_agent.judging.verifiers import VERIFIERS, Verifier, verify
from metis_agent.types import Question


def verdict(verifier: str, reference: str | None, answer: str) -> bool | None:
    return verify(Question(id="q", text="?", answer=reference, verifier=verifier), answer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("Paris", "paris."),
        ("Paris", "  “Paris”  "),
        ("Paris", "Ｐａｒｉｓ"),
        ("Paris", "The answer is Paris."),
        ("Paris", "Answer: **Paris**"),
        ("The Beatles", "Beatles"),
        ("Vitamin A", "vitamin a"),
        ("A", "a"),
        ("-5", "−5"),
        ("3.14", "3.14."),
        ("U.S.A.", "USA"),
        ("well-known", "well known"),
        ("1,234", "1234"),
        ("1,2", "1, 2"),
        ("Straße", "STRASSE"),
    ],
)
def test_exact_right(reference: str, answer: str) -> None:
    assert verdict("exact", reference, answer) is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("Paris", "Paris or London"),
        ("Paris", "I think it is Paris"),
        ("Paris", "not Paris"),
        ("Paris", ""),
        ("Vitamin A", "Vitamin"),
        ("3.14", "314"),
        ("-5", "5"),
        ("C++", "C"),
        ("C++", "C#"),
        ("1,2", "12"),
        ("A", ""),
    ],
)
def test_exact_wrong(reference: str, answer: str) -> None:
    assert verdict("exact", reference, answer) is False


def test_containing_the_reference_is_not_exact() -> None:
    assert verdict("exact", "Paris", "Paris, London, Rome and every other city") is False


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1234", "1,234"),
        ("1234", "1234.0"),
        ("1234", "1_234"),
        ("1234", "1'234"),
        ("1234", "1\u202f234"),
        ("1234", "1.234e3"),
        ("1234", "1.234 × 10^3"),
        ("1234", "1.234×10³"),
        ("1234", "The answer is 1,234 km."),
        ("1234", "$1,234"),
        ("42", "12 + 30 = 42"),
        ("42", "30 plus 12 equals 42."),
        ("42", "There are 3 boxes with 14 each, so 42"),
        ("42", "Step 2: 42"),
        ("42", "not 41 but 42"),
        ("42", "41.9999999"),
        ("42", "+42"),
        ("-5", "−5"),
        ("-5", "-$5"),
        ("-5", "3 - 8 = -5"),
        ("3.14", "3.14159"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("50%", "50 percent"),
        ("0.5", "50%"),
        ("0.5", "½"),
        ("1 1/2", "1½"),
        ("1/3", "0.333"),
        ("1/3", "2/6"),
        ("3 million", "3,000,000"),
        ("3000000", "3M"),
        ("3e8", "299792458"),
        ("6e23", "6×10²³"),
        ("8", "2^3 = 8"),
        ("123456789012345678901", "123456789012345678901"),
    ],
)
def test_numeric_right(reference: str, answer: str) -> None:
    assert verdict("numeric", reference, answer) is True


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("1234", "1235"),
        ("1234", "-1234"),
        ("1234", "12341"),
        ("1234", "1,2345"),
        ("1234", "x1234"),
        ("42", "42.1"),
        ("42", "42%"),
        ("42", "42k"),
        ("42", "3:42"),
        ("42", "forty-two"),
        ("42", ""),
        ("-5", "5"),
        ("3.14", "3.1"),
        ("3.14", "3.15"),
        ("0.5", "0.5%"),
        ("1 1/2", "11/2"),
        ("1/3", "0.3"),
        ("1/3", "1/0"),
        ("2", "2^3"),
        ("2", "CO2"),
        ("3 million", "3,000,001"),
        # One more than fits a float.
        ("123456789012345678901", "123456789012345678902"),
        ("1", "9" * 5000),
    ],
)
def test_numeric_wrong(reference: str, answer: str) -> None:
    assert verdict("numeric", reference, answer) is False


@pytest.mark.parametrize(
    "answer",
    [
        "41 or 42",
        "42 or 41",
        "41, 42",
        "41-42",
        "41 to 42",
        "41 and 42",
        "41. 42",
        "maybe 41, maybe 42",
        "It could be 41. It could be 42.",
        "41 km or 42 km",
        "41 km, 42 km",
        "41/42",
    ],
)
def test_numeric_is_not_fooled_by_hedging(answer: str) -> None:
    assert verdict("numeric", "42", answer) is False


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        " (B) \n",
        "(b)",
        "B.",
        "**B**",
        "B) Paris",
        "(B) Paris",
        "B. Paris",
        "B: Paris",
        "**B. Paris**",
        "B. Vitamin C",
        "The answer is B",
        "the answer is b",
        "The answer is (B).",
        "The correct answer is option B.",
        "The answer is B because A is wrong.",
        "Option A is wrong; the answer is B.",
        "Answer: B",
        "Option B",
        "I choose option B",
        r"$\boxed{B}$",
    ],
)
def test_choice_right(answer: str) -> None:
    assert verdict("choice", "B", answer) is True


@pytest.mark.parametrize(
    "answer",
    [
        "A",
        "",
        "Paris",
        "It is Bob",
        "A or B",
        "B or A",
        "A and B",
        "B, A",
        "B/C",
        "B; C",
        "A B",
        "A\nB",
        "A. B. C.",
        "(A) (B)",
        "A) x\nB) y",
        "Either B or C",
        "B, perhaps C",
        "B. Or maybe C.",
        "The answer is A or B",
        "The answer is B, or maybe C",
        "The answer is A. The answer is B.",
    ],
)
def test_choice_wrong_or_hedged(answer: str) -> None:
    assert verdict("choice", "B", answer) is False


def test_choice_tells_the_letter_from_the_article() -> None:
    assert verdict("choice", "A", "The answer is A") is True
    assert verdict("choice", "A", "A dog") is False
    assert verdict("choice", "A", "The answer is a bit unclear") is False


@pytest.mark.parametrize(
    ("verifier", "reference"),
    [
        ("exact", None),
        ("numeric", None),
        ("choice", None),
        ("numeric", "Paris"),
        ("choice", "Paris"),
        ("exact", " "),
    ],
)
def test_without_a_usable_reference_nothing_is_judged(verifier: str, reference: str | None) -> None:
    assert verdict(verifier, reference, "42") is None


def test_answer_is_read_from_the_final_message_only() -> None:
    """The reference implementation takes the first `<answer>` anywhere, a tool's output included."""
    from metis_agent.judging.verifiers import judge
    from tests.hdpo.reference import trajectory

    tool_output = {"type": "tool", "data": {"content": "<answer>yes</answer>"}}
    assert judge(trajectory("no", T=1, messages=(tool_output,)))[0] is False


def test_a_judge_replaces_a_verifier() -> None:
    def judge(question: Question, answer: str) -> bool | None:
        return "capital" in answer

    def down(question: Question, answer: str) -> bool | None:
        raise JudgeUnavailableError("the judge at 'judge:8000' does not answer")

    question = Question(id="q", text="Paris?", answer=None)
    assert verify(question, "It is the capital.", verifiers={**VERIFIERS, "exact": judge}) is True
    with pytest.raises(JudgeUnavailableError):
        verify(question, "x", verifiers={"exact": down})


@pytest.mark.parametrize(
    ("says", "right"), [(np.True_, True), (np.False_, False), (1, True), (0.0, False), (None, None)]
)
def test_a_verifier_of_ones_own_may_count_in_numbers(says: object, right: bool | None) -> None:
    question = Question(id="q", text="?", answer="a", verifier="mine")
    assert verify(question, "a", verifiers={"mine": lambda question, answer: says}) is right  # type: ignore[dict-item]


@pytest.mark.parametrize("mine", [lambda question, answer: "no", lambda question, answer: 0.4, lambda _, a: int(a) > 1])
def test_a_verifier_of_ones_own_that_fails_or_says_something_else_is_named(mine: Verifier) -> None:
    question = Question(id="q", text="?", answer="a", verifier="mine")
    with pytest.raises(
        ConfigurationError, match=r"The verifier 'mine' (failed on the answer 'x' to question 'q'|returned)"
    ):
        verify(question, "x", verifiers={"mine": mine})


def test_an_unknown_verifier_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'fuzzy'.*\['choice', 'exact', 'math', 'numeric', 'prose'\]"):
        verdict("fuzzy", "x", "x")


@given(st.integers(-(10**15), 10**15))
def test_any_integer_survives_its_dressings(number: int) -> None:
    for text in (str(number), f"{number:,}", f"{number:_}", f"So it is {number:,}.", f"{number}.0"):
        assert verdict("numeric", str(number), text) is True
    assert verdict("numeric", str(number), str(number + 1)) is False
    assert verdict("numeric", str(number), f"{number} or {number + 1}") is False


@given(st.text(max_size=60))
def test_no_text_breaks_a_verifier(text: str) -> None:
    assert normalise(text) == normalise(f" {text}\n")
    for name in VERIFIERS:
        assert verdict(name, text, text) in (True, None, False)
        assert verdict(name, "B", text) in (True, None, False)


def test_verifiers_need_neither_torch_nor_numpy() -> None:
    probe = "import sys, metis_agent.judging.verifiers; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
