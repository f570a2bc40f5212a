"""MathVista: mathematics that has to be seen. Options, whole numbers, decimals and lists.

Source: lupantech/MathVista, `extract_answer.py` and `calculate_score.py` (Lu et al., arXiv:2310.02255); testmini, 1,000
questions with public answers. Two steps: an answer is *extracted* from what the model said (`extraction`), then
*normalised* by the question's type, and compared as text:

    options    the option of that letter; of any other text the option with the fewest edits to it (Levenshtein)
    integer    int(float(x))
    float      x rounded to the question's precision
    list       as it is written

Where nothing can be extracted the authors' script falls back on the option closest to the empty text; here, as under
its own flag `ignore_empty_extractions`, that is a wrong answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from metis_agent.benchmarks.base import Item, Measure, Published, Row, Source, Verdicts, spread
from metis_agent.benchmarks.extraction import extract_by_rule
from metis_agent.benchmarks.letters import item_id
from metis_agent.errors import InputError
from metis_agent.types import Question

__all__ = ["Extract", "MathVista", "edits", "normalised"]

Extract = Callable[[Question, str], str | None]
"""From what a model said to its answer; `None` or "" where there is none."""

_FIELDS = ("pid", "question", "answer", "question_type", "answer_type")
_TABLES = ("question_type", "answer_type", "task", "context", "grade", "category", "language", "source")
_LETTER = re.compile(r"\(([a-zA-Z])\)")
_LONGEST = 1000
"""Characters of an extraction that edits are counted in."""


def edits(one: str, other: str) -> int:
    """The Levenshtein distance: insertions, deletions and replacements."""
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, start=1):
        before, row[0] = row[0], place
        for column, wanted in enumerate(other, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (character != wanted))
    return row[-1]


def normalised(extraction: str, metadata: Any) -> str | None:
    """An extraction in the form of the reference answer; `None` where it has none.

    Args:
        extraction: What was extracted.
        metadata: Of the question: `question_type`, `answer_type`, `choices` and `precision`.
    """
    if metadata["question_type"] == "multi_choice":
        choices = list(metadata["choices"])
        text = extraction.strip()[:_LONGEST]
        if found := _LETTER.findall(text):
            text = found[0].upper()
        place = ord(text) - ord("A") if len(text) == 1 else -1
        if 0 <= place < len(choices):
            return str(choices[place])
        return str(min(choices, key=lambda choice: edits(text, str(choice)))) if choices else None
    if metadata["answer_type"] not in ("integer", "float"):
        return extraction
    try:
        value = float(extraction)
        if metadata["answer_type"] == "integer":
            return str(int(value))
        return str(round(value, int(metadata["precision"] or 0)))
    except (ValueError, OverflowError):
        return None


class MathVista:
    """MathVista, testmini.

    Args:
        extract: Extracts answers; by default by rules. The authors have a language model do it: see `ModelExtractor`.
    """

    name = "mathvista"
    source = Source(
        repository="AI4Math/MathVista",
        files=("data/testmini-*.parquet",),
        images="decoded_image",
        licence="CC BY-SA 4.0; not for training",
    )
    headline: tuple[str, ...] = ("accuracy", "question_type: multi_choice", "question_type: free_form")
    published: tuple[Published, ...] = (
        Published(who="Metis-8B", values={"accuracy": 0.780}),
        Published(who="Qwen3-VL-8B", values={"accuracy": 0.763}),
    )

    def __init__(self, extract: Extract = extract_by_rule) -> None:
        self._extract = extract

    def items(self, rows: Iterable[Row]) -> list[Item]:
        """The questions, worded as the data set's `query`."""
        return [self._item(number, row) for number, row in enumerate(rows)]

    def right(self, question: Question, answer: str) -> bool | None:
        """Whether the extracted and normalised answer is the reference."""
        extraction = self._extract(question, answer)
        if extraction is None or not extraction.strip():
            return None
        return normalised(extraction, question.metadata) == question.answer

    def measures(self, items: Sequence[Item], verdicts: Verdicts) -> dict[str, Measure]:
        """Accuracy of all, and by each of the tables that the authors print."""
        parts: dict[str, list[list[Item]]] = {"accuracy": [list(items)]}
        for table in (*_TABLES, "skills"):
            for item in items:
                of_item = item.question.metadata.get(table) or ()
                for value in [of_item] if isinstance(of_item, str) else of_item:
                    parts.setdefault(f"{table}: {value}", [[]])[0].append(item)
        return spread(items, verdicts, parts)

    def _item(self, number: int, row: Row) -> Item:
        if missing := [name for name in _FIELDS if row.get(name) in (None, "")]:
            raise InputError(f"row {number} of MathVista has no {missing[0]!r}; it has {sorted(row)!r}.")
        about = {key: value for key, value in dict(row.get("metadata") or {}).items() if value is not None}
        choices = [str(choice) for choice in row.get("choices") or ()]
        precision = row.get("precision")
        text, answer = str(row.get("query") or "") or _query(row, choices), str(row["answer"])
        if row["question_type"] == "multi_choice" and answer not in choices:
            raise InputError(f"row {number} of MathVista has the answer {answer!r} and the choices {choices!r}.")
        own = {
            "question_type": str(row["question_type"]), "answer_type": str(row["answer_type"]), "choices": choices,
            "precision": None if precision is None or math.isnan(precision) else int(precision),
            "asked": str(row["question"]), "reference": answer, "pid": str(row["pid"]),
        }  # fmt: skip
        question = Question(
            id=item_id(self.name, number, text, answer), text=text, answer=answer, verifier="exact",
            kind=str(about.get("task") or ""), metadata={**about, **own},
        )  # fmt: skip
        return Item(question=question, unit=str(number), row=number)


def _query(row: Row, choices: Sequence[str]) -> str:
    """For a copy without the `query` column: the question, its unit, its options, and the form of the answer."""
    forms = {"integer": "a whole number", "float": "a decimal number", "list": "a Python list"}
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    parts = [f"Question: {row['question']}{unit}"]
    if choices:
        parts += ["Choices:", *(f"({chr(ord('A') + place)}) {choice}" for place, choice in enumerate(choices))]
        return "\n".join([*parts, "Answer with the letter of the right option, at the end."])
    return "\n".join([*parts, f"Give the final answer, {forms.get(str(row['answer_type']), 'a text')}, at the end."])
