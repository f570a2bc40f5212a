"""Answers in sentences: right where they commit to the reference, wrong where they deny it, hedge or list several."""

import pytest

from metis_agent.errors import ConfigurationError
from metis_agent.judging.verifiers import prose
from metis_agent.types import Question

STOCK = "How many of part-7 are in stock?"


@pytest.mark.parametrize(
    ("asked", "reference", "answer", "right"),
    [
        ("How many of part-7 are in stock?", "259", "There are 259 of part-7 in stock.", True),
        ("How many of part-7 are in stock?", "259", "There are 258 of part-7 in stock.", False),
        ("How many of part-7 are in stock?", "7", "There are 7 of part-7 in stock.", True),
        ("What is the capital of France?", "Paris", "The capital of France is Paris.", True),
        ("What is the capital of France?", "Paris", "It could be Paris or Lyon.", False),
        ("What is the capital of France?", "Paris", "It is not Paris.", False),
        ("What is the capital of France?", "Paris", "It is Lyon, not Paris.", False),
        ("What is 12 + 30?", "42", "12 + 30 = 42", True),
        ("What is 12 * 4?", "48", "12 * 4 is 48, since 12 * 2 is 24 and twice 24 is 48.", True),
        ("When was it built?", "1889", "It was built in 1889.", True),
        ("When was the Eiffel Tower completed?", "1889", "The Eiffel Tower was completed in 1889 [1].", True),
        ("How many live in Bern?", "134000", "As of 2024, about 134,000 people live in Bern.", True),
        ("How many live in Bern?", "134000", "About 134,000 people live in Bern (as of 2024).", True),
        ("Is it open?", "yes", "Yes, it is open.", True),
        ("Is it open?", "no", "Yes, it is open.", False),
        ("Is it open?", "No", "No. It closed.", True),
        ("Which?", "B", "The answer is B, because it fits.", True),
        ("Which?", "B", "A or B", False),
        ("Who wrote it?", "Jane Austen", "It was written by Jane Austen in 1813.", True),
        ("Who wrote it?", "Jane Austen", "I don't know who wrote it, maybe Jane Austen.", False),
        ("首都是哪里?", "北京", "中国的首都是北京。", True),
        ("What does it cost?", "$5", "It costs $5.", True),
        ("What does it cost?", "$5", "It costs 5 dollars, i.e. $5.00.", True),
        ("How far?", "12.5 km", "It is 12.5 km away.", True),
        ("How far?", "12.5 km", "It is 13 km away.", False),
        ("When was it built?", "1984", "It was built in 1984.", True),
        ("When was it built?", "1984", "Begun on 3 May 1979, it was completed in 1984.", True),
        ("Who?", "Bob", "It isn't Bob.", False),
        ("Who?", "Bob", "I don't know. Bob?", True),
        ("Color?", "red", "The colors red, green, blue and yellow are all candidates.", True),
        ("Is X > Y?", "259", "There are between 200 and 300.", False),
        ("price of part-7?", "259", "The price is 259 or 260.", False),
        ("price of part-7?", "259", "part-7: 259", True),
    ],
)
def test_a_commitment_is_told_from_an_occurrence(asked: str, reference: str, answer: str, right: bool) -> None:
    assert prose(Question(id="q", text=asked, answer=reference), answer) is right


def test_aliases_and_tolerance() -> None:
    york = Question(id="q", text="Where?", answer="New York City", metadata={"aliases": ["NYC", "New York"]})
    assert prose(york, "It is in New York, near the river.")
    assert not prose(york, "It is in Newark.")
    about = Question(id="q", text="How far?", answer="385,000 km", metadata={"tolerance": "1%"})
    assert prose(about, "The Moon is about 384,400 km away.")
    assert not prose(about, "The Moon is about 300,000 km away.")
    with pytest.raises(ConfigurationError, match="tolerance 'a bit'"):
        prose(Question(id="q", text="?", answer="3", metadata={"tolerance": "a bit"}), "4")


def test_without_a_reference_there_is_no_verdict() -> None:
    assert prose(Question(id="q", text="?"), "42") is None


def test_what_is_right_as_the_bare_answer_is_right_in_prose() -> None:
    for reference in ("42", "-3.5", "Paris", "B", "yes", "C++", "1/2", "50%", "Müller", "3.14"):
        assert prose(Question(id="q", text="What?", answer=reference), reference), reference
