"""When is an answer right? Cases worked by hand, and what the authors' public scripts make of the same texts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, InputError, JudgeUnavailableError
from metis_agent.evaluation.benchmarks import BENCHMARKS, benchmark_named
from metis_agent.evaluation.benchmarks.base import Item, chosen_letter
from metis_agent.evaluation.benchmarks.mathvista import MathVista, ModelExtractor, edits, extract_by_rule, normalised
from metis_agent.evaluation.benchmarks.options import HRBench, VStar, WeMath, four_metrics, read_letter
from metis_agent.types import Question
from tests.fakes import model

GLOVE = {"A": "rubber", "B": "cotton", "C": "kevlar", "D": "leather"}
VSTAR_ROW: dict[str, Any] = {
    "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
    "Answer with the option's letter from the given choices directly.",
    "category": "direct_attributes", "label": "A", "question_id": "0",
}  # fmt: skip


# --- letters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("C.", "C"),
        ("D. leather", "D"),
        ("The answer is (A), for it shines.", "A"),
        ("**B**", "B"),
        ("\\boxed{C}", "C"),
        ("The handle is black.\nAnswer: D", "D"),
        ("Kevlar", "C"),
        ("The answer is cotton.", "B"),
        ("A or B", None),
        ("I can't tell.", None),
        ("E", None),
        ("rubber or cotton", None),
        ("", None),
    ],
)
def test_which_option_an_answer_commits_to(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, GLOVE) == letter


def test_vstar_compares_the_letter_with_the_label() -> None:
    (item,) = VStar().items([VSTAR_ROW])
    assert item.question.metadata["options"] == GLOVE
    assert [VStar().right(item.question, answer) for answer in ("A", "rubber", "B", "hm")] == [True, True, False, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"label": "E"}, "has the label 'E'"), ({"text": ""}, "has no 'text'"), ({"category": None}, "no 'category'")],
)
def test_a_row_that_is_no_question_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        VStar().items([{**VSTAR_ROW, **change}])


def test_ids_name_what_is_asked() -> None:
    """Another edition of a data set, with another wording or label, is not taken for the one that was recorded."""
    ids = {
        VStar().items([row])[0].question.id
        for row in (VSTAR_ROW, {**VSTAR_ROW, "label": "B"}, {**VSTAR_ROW, "text": "So? " + VSTAR_ROW["text"]})
    }
    assert len(ids) == 3


# --- HR-Bench -------------------------------------------------------------------------------------------------


def hr_rows(category: str, count: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "question": f"{category} {number}?", "answer": "ABCD"[order], "category": category,
            "cycle_category": str(order), "file": "hr_bench_4k.parquet",
            **{letter: "right" if place == order else f"wrong {place}" for place, letter in enumerate("ABCD")},
        }
        for number in range(count)
        for order in range(4)
    ]  # fmt: skip


def test_hrbench_is_the_mean_over_the_orders() -> None:
    """`hrbench.py`: of each `cycle_category` the mean of the scores, then the mean of those.

    A model that always says A: right in the first order of each question. Of 2 questions, with one answer lost in
    the second order: orders score 2/2, 0/1, 0/2, 0/2, mean 1/4. A plain mean would be 2/7.
    """
    bench = HRBench(("4k",))
    items = bench.items([*hr_rows("single"), *hr_rows("cross")])
    assert [item.unit for item in items] == ["4k-0"] * 4 + ["4k-1"] * 4
    verdicts = {item.question.id: bool(bench.right(item.question, "A")) for item in items}
    del verdicts[items[5].question.id]
    measures = bench.measures(items, verdicts)
    assert list(measures) == ["4k accuracy", "4k FSP", "4k FCP"]
    found = measures["4k accuracy"]
    assert found.right.sum(axis=1).tolist() == [2, 0, 0, 0]
    assert found.of.sum(axis=1).tolist() == [2, 1, 2, 2]
    assert (found.right.sum(axis=1) / found.of.sum(axis=1)).mean() == 0.25


def test_hrbench_orders_may_come_in_any_order() -> None:
    rows = sorted(hr_rows("single", count=2), key=lambda row: row["cycle_category"])
    assert [item.unit for item in HRBench(("4k",)).items(rows)] == ["4k-0", "4k-1"] * 4


# --- We-Math --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # `response.split("Answer")[-1]`, without > < : and full stops, then its first character if it is A to H.
        ("<Thought process>: <<it is so>> <Answer>: <<C>>", "C"),
        ("<Thought process>: Answer A is wrong. <Answer>: D.", "D"),
        ("B", "B"),
        ("B. 4 cm", "B"),
        ("Answer: E", "E"),
        ("Because it is so", "B"),  # what their script reads, too
        ("The answer is C", None),
        ("Answer: 4 cm", None),
        ("Answer", None),
        ("", None),
        ("<Answer>: c", None),
    ],
)
def test_wemath_reads_as_its_script_does(answer: str, letter: str | None) -> None:
    assert read_letter(answer) == letter


def script_metrics(steps: list[bool], whole: bool) -> dict[str, bool]:
    """The filters of `four_dimensional_metrics.py`, written out for two and for three steps."""
    if len(steps) == 2:
        one, two = steps
        return {
            "RM loose": (not one and not two) and whole, "RM strict": (not one or not two) and whole,
            "IG": (one and two) and not whole, "IK": (not one or not two) and not whole,
            "CM loose": (one or two) and whole, "CM strict": (one and two) and whole,
        }  # fmt: skip
    one, two, three = steps
    return {
        "RM loose": (not one and not two and not three) and whole,
        "RM strict": (not one or not two or not three) and whole,
        "IG": (one and two and three) and not whole, "IK": (not one or not two or not three) and not whole,
        "CM loose": (one or two or three) and whole, "CM strict": (one and two and three) and whole,
    }  # fmt: skip


@pytest.mark.parametrize("count", [2, 3])
def test_every_problem_counts_as_the_script_has_it(count: int) -> None:
    for *steps, whole in itertools.product((False, True), repeat=count + 1):
        found = four_metrics(steps, whole)
        assert found == {name: float(value) for name, value in script_metrics(steps, whole).items()}
        for kind in ("strict", "loose"):
            assert found["IK"] + found["IG"] + found[f"CM {kind}"] + found[f"RM {kind}"] == 1


def we_items(problems: list[int]) -> list[Item]:
    rows = [
        {
            "ID": f"{steps}steps_{number}", "key": f"{steps}steps_{part}", "answer": "A", "option": "A. 1; B. 2",
            "question": f"{number} {part}?",
        }
        for number, steps in enumerate(problems)
        for part in [*(str(step) for step in range(1, steps + 1)), "multi"]
    ]  # fmt: skip
    return WeMath().items(rows)


@given(st.data())
def test_the_scores_are_those_of_the_script(data: st.DataObject) -> None:
    """score = (n - 0.5 IG - RM - IK) / n; RM's rate is RM / (CM + RM)."""
    problems = data.draw(st.lists(st.sampled_from([2, 3]), min_size=1, max_size=6))
    items = we_items(problems)
    verdicts = {item.question.id: data.draw(st.booleans()) for item in items}
    totals: dict[str, int] = dict.fromkeys(("IK", "IG", "CM strict", "CM loose", "RM strict", "RM loose"), 0)
    place = 0
    for steps in problems:
        judged = [verdicts[item.question.id] for item in items[place : place + steps + 1]]
        place += steps + 1
        for name, value in script_metrics(judged[:-1], judged[-1]).items():
            totals[name] += value
    measures = WeMath().measures(items, verdicts)
    for kind in ("strict", "loose"):
        expected = (len(problems) - 0.5 * totals["IG"] - totals[f"RM {kind}"] - totals["IK"]) / len(problems)
        assert ratio(measures[f"score {kind}"]) == pytest.approx(expected)
        whole = totals[f"CM {kind}"] + totals[f"RM {kind}"]
        rate = ratio(measures[f"RM {kind}"])
        assert np.isnan(rate) if not whole else rate == pytest.approx(totals[f"RM {kind}"] / whole)
        assert ratio(measures[f"CM {kind}"]) == pytest.approx(totals[f"CM {kind}"] / len(problems))


def ratio(measure: Any) -> float:
    return float(measure.right.sum() / measure.of.sum()) if measure.of.sum() else float("nan")


def test_a_problem_with_a_lost_part_is_left_out_of_the_four() -> None:
    items = we_items([2, 2])
    verdicts = {item.question.id: True for item in items[1:]}
    measures = WeMath().measures(items, verdicts)
    assert measures["CM strict"].of.tolist() == [[0, 1]]
    assert ratio(measures["one-step"]) == 1
    assert measures["one-step"].of.sum() == 3
    with pytest.raises(InputError, match="has the key '4steps_1'"):
        WeMath().items([{"ID": "x", "key": "4steps_1", "answer": "A", "option": "A. 1", "question": "?"}])


# --- MathVista ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("kitten", "sitting", 3), ("abc", "", 3), ("", "ab", 2), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edits_by_hand(one: str, other: str, distance: int) -> None:
    assert edits(one, other) == edits(other, one) == distance


def about(kind: str, precision: int | None = None, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    question_type = "multi_choice" if choices else "free_form"
    return {"question_type": question_type, "answer_type": kind, "precision": precision, "choices": list(choices)}


@pytest.mark.parametrize(
    ("extraction", "metadata", "expected"),
    [
        # `normalize_extracted_answer`, case by case.
        ("B", about("text", choices=("3/11", "8/11", "6/11", "3/5")), "8/11"),
        ("(B) 8/11", about("text", choices=("3/11", "8/11", "6/11", "3/5")), "8/11"),
        ("(c)", about("text", choices=("3/11", "8/11", "6/11", "3/5")), "6/11"),
        ("b", about("text", choices=("no", "yes")), "no"),  # no letter of theirs: the closest text, 2 edits to "no"
        ("8/12", about("text", choices=("3/11", "8/11", "6/11", "3/5")), "8/11"),
        ("E", about("text", choices=("no", "yes")), "no"),
        ("14", about("integer"), "14"),
        ("14.0", about("integer"), "14"),
        ("14.9", about("integer"), "14"),
        ("two", about("integer"), None),
        ("1.449", about("float", 2), "1.45"),
        ("0.6", about("float", 1), "0.6"),
        ("0.60", about("float", 1), "0.6"),
        ("nan of it", about("float", 1), None),
        ("[2007, 2008]", about("list"), "[2007, 2008]"),
        ("1e400", about("integer"), None),
    ],
)
def test_an_extraction_is_normalised_as_the_script_does(
    extraction: str, metadata: dict[str, Any], expected: str | None
) -> None:
    assert normalised(extraction, metadata) == expected


def mv(kind: str, answer: str, precision: float | None = None, choices: list[str] | None = None) -> Question:
    row = {
        "pid": "1", "question": "How many?", "answer": answer, "answer_type": kind, "precision": precision,
        "question_type": "multi_choice" if choices else "free_form", "choices": choices, "unit": "$",
        "metadata": {"task": "figure question answering", "skills": ["arithmetic reasoning"], "language": None},
    }  # fmt: skip
    return MathVista().items([row])[0].question


@pytest.mark.parametrize(
    ("question", "said", "right"),
    [
        (mv("integer", "14"), "14", True),
        (mv("integer", "14"), "The number missing in the sequence is 14.", True),
        (mv("integer", "14"), "It is 13 or so.", False),
        (mv("integer", "1200"), "That makes 1,200 in all", True),
        (mv("integer", "7"), "first 3, then 4, so \\boxed{7} of 9", True),
        (mv("integer", "14"), "fourteen", None),
        (mv("float", "1.45", 2.0), "Luca needs $1.45 to buy both.", True),
        (mv("float", "1.5", 1.0), "1.4999", True),
        (mv("float", "0.6", 1.0), "the fraction is 0.61", True),
        (mv("float", "0.6", 1.0), "the fraction is 0.5", False),
        (mv("list", "[2007, 2008]"), "Its peak was in [2007,2008].", True),
        (mv("list", "[2007, 2008]"), "between 2007 and 2008", None),
        (mv("text", "8/11", None, ["3/11", "8/11", "6/11"]), "8/11", True),
        (mv("text", "8/11", None, ["3/11", "8/11", "6/11"]), "The correct answer is (B) 8/11.", True),
        (mv("text", "8/11", None, ["3/11", "8/11", "6/11"]), 'The answer is "8/11".', True),
        (mv("text", "8/11", None, ["3/11", "8/11", "6/11"]), "A", False),
        (mv("text", "8/11", None, ["3/11", "8/11", "6/11"]), "", None),
    ],
)
def test_mathvista_by_rule(question: Question, said: str, right: bool | None) -> None:
    assert MathVista().right(question, said) is right


@pytest.mark.parametrize(
    "said", ["[" * 100_000, "9" * 10_000, "\\boxed{" * 1000, "1,000" * 10_000, "[1" + ",1" * 50_000]
)
def test_no_text_holds_the_reading_up(said: str) -> None:
    for kind in ("integer", "float", "list"):
        question = mv(kind, "1", 1.0)
        assert MathVista().right(question, said) in (True, False, None)
    assert MathVista(lambda question, text: text).right(mv("text", "no", None, ["no", "yes"]), said) is not None


def test_a_question_without_a_query_is_worded_from_its_parts() -> None:
    text = mv("text", "8/11", None, ["3/11", "8/11"]).text
    assert text.splitlines()[:3] == ["Question: How many? (Unit: $)", "Choices:", "(A) 3/11"]
    assert "a whole number" in mv("integer", "1").text


def test_a_model_extracts_where_no_quick_rule_does_and_once() -> None:
    reader = model("[2007, 2008]")
    extract = ModelExtractor(reader, name="reader")
    bench = MathVista(extract)
    question = mv("list", "[2007, 2008]")
    said = "The peak was between 2007 and 2008."
    extract.read([(question, said), (question, said)])
    assert bench.right(question, said) is True
    assert len(reader.asked) == 1
    prompt = reader.asked[0].messages[0].text
    assert prompt.endswith(f"{question.text}\nReply: {said}\nAnswer:")
    assert bench.right(mv("integer", "14"), "14") is True  # the answer alone needs no model
    assert len(reader.asked) == 1


def test_an_extractor_that_finds_nothing_or_is_down() -> None:
    question = mv("integer", "14")
    assert MathVista(ModelExtractor(model("-"), name="r")).right(question, "who knows") is None
    down = ModelExtractor(model(OSError("down")), name="r")
    with pytest.raises(JudgeUnavailableError, match="has no extraction from 'r'"):
        MathVista(down).right(question, "it is fourteen")


def test_the_rules_read_nothing_out_of_silence() -> None:
    assert extract_by_rule(mv("integer", "14"), "  \n") is None


# --- names ----------------------------------------------------------------------------------------------------


def test_every_name_makes_its_benchmark() -> None:
    assert [benchmark_named(name).name for name in BENCHMARKS] == list(BENCHMARKS)
    with pytest.raises(ConfigurationError, match="unknown benchmark 'mmmu'"):
        benchmark_named("mmmu")
