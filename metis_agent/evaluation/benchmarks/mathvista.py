"""MathVista: mathematics that has to be seen. Options, whole numbers, decimals and lists.

Source: lupantech/MathVista, `extract_answer.py` and `calculate_score.py` (Lu et al., arXiv:2310.02255); testmini, 1,000
questions with public answers. Two steps: an answer is *extracted* from what the model said, by rules or, as its authors
do it, by a language model; then it is *normalised* by the question's type, and compared as text:

    options    the option of that letter; of any other text the option with the fewest edits to it (Levenshtein)
    integer    int(float(x))
    float      x rounded to the question's precision
    list       as it is written

The authors' quick rules come first in both: the answer alone, an option alone, and 'The answer is "...".'. Beyond those
the rules here read the letter that an answer commits to, the content of a box, the last number, the last list. Where
nothing can be extracted the authors' script falls back on the option closest to the empty text; here, as under its own
flag `ignore_empty_extractions`, that is a wrong answer.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage

from metis_agent.errors import InputError, JudgeUnavailableError
from metis_agent.evaluation.benchmarks.base import (
    Item,
    Measure,
    Published,
    Row,
    Source,
    Verdicts,
    chosen_letter,
    item_id,
    spread,
)
from metis_agent.sqlite import DiskCache, content_key
from metis_agent.types import Question

__all__ = ["Extract", "MathVista", "ModelExtractor", "edits", "extract_at_once", "extract_by_rule", "normalised"]

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")
_LIST = re.compile(r"\[[^\[\]]*\]")
_EXAMPLES = (
    ("a whole number", "How many apples are on the table?", "I count four and three more, so there are 7.", "7"),
    ("a decimal with one place", "What share of the bars is blue?", "Three of ten bars are: the share is 0.3.", "0.3"),
    ("a decimal with two places", "What do the two cost? (Unit: $)", "They cost $2.75 together.", "2.75"),
    ("a list", "Between which years is the steepest fall?", "It falls most from 1998 to 1999.", "[1998, 1999]"),
    ("the letter of an option", "Which is longer? (A) a (B) b (C) equal", "Line b is longer, hence (B) b.", "B"),
)
_TASK = (
    "Read what a model said in reply to a question, and write the answer that it gives, and nothing else. Write - if "
    "it gives none. Do not solve the question yourself."
)
_AT_ONCE = 16


def extract_at_once(question: Question, said: str) -> str | None:
    """What needs no reading: the answer alone, an option alone, or 'The answer is "...".'; else `None`."""
    about = question.metadata
    if about["question_type"] == "multi_choice" and said in about["choices"]:
        return said
    kind = {"integer": int, "float": float}.get(about["answer_type"])
    if kind is not None:
        try:
            return str(kind(said))
        except ValueError:
            pass
    quoted = _QUOTED.search(said)
    return quoted[1] if quoted else None


def extract_by_rule(question: Question, said: str) -> str | None:
    """The answer, by rules alone; `None` where they find none."""
    if not said.strip():
        return None
    if (found := extract_at_once(question, said)) is not None:
        return found
    about = question.metadata
    if about["question_type"] == "multi_choice":
        letters = {chr(ord("A") + place): str(choice) for place, choice in enumerate(about["choices"])}
        letter = chosen_letter(said, letters)
        return None if letter is None else letters[letter]
    boxed = _BOX.findall(said)
    text = boxed[-1] if boxed else said
    if about["answer_type"] == "list":
        return _last_list(text)
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


class ModelExtractor:
    """Has a language model extract answers, where they are not given at once.

    Args:
        model: A LangChain chat model.
        name: Identifies it in the cache.
        cache: Where extractions are kept; in memory by default.
    """

    def __init__(self, model: BaseChatModel, *, name: str, cache: DiskCache | None = None) -> None:
        self._model, self._name = model, name
        self._cache = cache or DiskCache(None)

    def __call__(self, question: Question, said: str) -> str | None:
        """As `Extract`.

        Raises:
            JudgeUnavailableError: the model can't be asked; the answer is neither right nor wrong.
        """
        if not said.strip():
            return None
        if (found := extract_at_once(question, said)) is not None:
            return found
        key = self._key(question, said)
        kept = self._cache.get(key)
        if kept is None:
            self.read([(question, said)])
            kept = self._cache.get(key)
        if kept is None:
            raise JudgeUnavailableError(
                f"question {question.id!r} has no extraction from {self._name!r}: the model did not answer. Run the "
                "same again once it does; earlier extractions are kept."
            )
        found = str(kept).strip()
        return None if found in ("", "-") else found

    def read(self, pairs: Iterable[tuple[Question, str]]) -> None:
        """Ask for many at once; what fails is left for later."""
        open_ = {
            self._key(question, said): _prompt(question, said)
            for question, said in pairs
            if said.strip() and extract_at_once(question, said) is None
        }
        known = self._cache.get_many(open_)
        keys = [key for key in open_ if key not in known]
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            replies = self._asked([open_[key] for key in part])
            self._cache.put_many(
                {key: reply for key, reply in zip(part, replies, strict=True) if reply is not None}
            )  # fmt: skip

    def _asked(self, prompts: Sequence[str]) -> list[str | None]:
        replies: list[Any] = self._model.batch(
            [[HumanMessage(prompt)] for prompt in prompts], {"max_concurrency": _AT_ONCE}, return_exceptions=True
        )
        return [None if isinstance(reply, BaseException) else str(reply.text) for reply in replies]

    def _key(self, question: Question, said: str) -> str:
        return content_key("mathvista extraction", self._name, question.text, said)


def _prompt(question: Question, said: str) -> str:
    shown = [
        f"The answer is {form}.\nQuestion: {asked}\nReply: {reply}\nAnswer: {answer}"
        for form, asked, reply, answer in _EXAMPLES
    ]
    return "\n\n".join([_TASK, *shown, f"{question.text}\nReply: {said}\nAnswer:"])


def _last_list(text: str) -> str | None:
    for found in reversed(_LIST.findall(text)):
        try:
            return str(ast.literal_eval(found))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


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
