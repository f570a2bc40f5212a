"""From what a model said to the answer that MathVista scores: by rules, or, as its authors do it, by a language model.

The authors' quick rules come first in both: the answer alone, an option alone, and 'The answer is "...".'. Beyond those
the rules here read the letter that an answer commits to, the content of a box, the last number, the last list.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage

from metis_agent.benchmarks.letters import chosen_letter
from metis_agent.errors import JudgeUnavailableError
from metis_agent.hdpo.disk_cache import DiskCache, content_key
from metis_agent.types import Question

__all__ = ["ModelExtractor", "extract_at_once", "extract_by_rule"]

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
