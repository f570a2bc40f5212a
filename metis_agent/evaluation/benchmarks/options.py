"""V*Bench: which colour has a thing that fills a thousandth of the picture, and on which side of another is it?

Source: penghao-wu/vstar (Wu and Xie, arXiv:2312.14135). 191 questions with lettered options, of two categories; the
score is the share of right ones, of each category and of all. Its own script picks the option with the smallest loss,
which only a model in the same process can; for models that talk, the authors publish the questions with lettered
options and the right letter (`test_questions.jsonl`), and the letter that an answer commits to is compared with that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from metis_agent.errors import InputError
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
from metis_agent.types import Question

__all__ = ["VStar"]

_OPTION = re.compile(r"^\s*\(([A-H])\)\s*(.+?)\s*$", re.MULTILINE)
_FIELDS = ("text", "label", "category", "question_id")


class VStar:
    """V*Bench."""

    name = "vstar"
    source = Source(
        repository="craigwu/vstar_bench",
        files=("test_questions.jsonl",),
        beside=("direct_attributes/*", "relative_position/*"),
        images="image",
        licence="its card names none",
    )
    headline: tuple[str, ...] = ("accuracy", "direct_attributes", "relative_position")
    published: tuple[Published, ...] = (
        Published(who="Metis-8B", values={"accuracy": 0.911}),
        Published(who="Qwen3-VL-8B", values={"accuracy": 0.864}),
    )

    def items(self, rows: Iterable[Row]) -> list[Item]:
        """The questions, as the data set words them."""
        return [self._item(number, row) for number, row in enumerate(rows)]

    def right(self, question: Question, answer: str) -> bool | None:
        """Whether the letter is the right one."""
        letter = chosen_letter(answer, question.metadata["options"])
        return None if letter is None else letter == question.answer

    def measures(self, items: Sequence[Item], verdicts: Verdicts) -> dict[str, Measure]:
        """Accuracy, of all and of each category."""
        kinds = sorted({item.question.kind for item in items})
        parts = {kind: [[item for item in items if item.question.kind == kind]] for kind in kinds}
        return spread(items, verdicts, {"accuracy": [items], **parts})

    def _item(self, number: int, row: Row) -> Item:
        if missing := [name for name in _FIELDS if row.get(name) in (None, "")]:
            raise InputError(f"row {number} of V*Bench has no {missing[0]!r}; it has {sorted(row)!r}.")
        text, label = str(row["text"]), str(row["label"]).strip().upper()
        options = dict(_OPTION.findall(text))
        if label not in options:
            raise InputError(f"row {number} of V*Bench has the label {label!r} and the options {sorted(options)!r}.")
        question = Question(
            id=item_id(self.name, number, text, label), text=text, answer=label, verifier="choice",
            kind=str(row["category"]),
            metadata={"options": options, "reference": f"({label}) {options[label]}", "row": str(row["question_id"])},
        )  # fmt: skip
        return Item(question=question, unit=str(number), row=number)
