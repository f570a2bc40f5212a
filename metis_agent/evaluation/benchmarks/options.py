"""The benchmarks of lettered options about pictures: V*Bench, HR-Bench and We-Math.

V*Bench: which colour has a thing that fills a thousandth of the picture, and on which side of another is it?

Source: penghao-wu/vstar (Wu and Xie, arXiv:2312.14135). 191 questions with lettered options, of two categories; the
score is the share of right ones, of each category and of all. Its own script picks the option with the smallest loss,
which only a model in the same process can; for models that talk, the authors publish the questions with lettered
options and the right letter (`test_questions.jsonl`), and the letter that an answer commits to is compared with that.

HR-Bench: questions about photographs of 4K and 8K, each asked with its four options in four orders.

Source: DreamMr/HR-Bench (Wang et al., arXiv:2408.15556). The rows hold the orders (`cycle_category`); the score of an
order is the share of right answers, and the benchmark's the mean over the orders: of all, of single objects (FSP) and
of several (FCP). A model that likes a letter is so found out. Its own script has a language model say yes or no to each
answer; here the letter that the answer commits to decides, and a judge where there is none (`--judge`).

We-Math: does a model that solves a problem of two or three steps also master each step, and the other way round?

Source: We-Math/We-Math, `four_dimensional_metrics.py` and `accuracy.py` (Qiao et al., arXiv:2407.01284). 525 problems;
each is asked as a whole and step by step. By which of these are right a problem counts as

    IK  insufficient knowledge      a step wrong, and the whole wrong
    IG  inadequate generalisation   all steps right, the whole wrong
    CM  complete mastery            the whole right, and all steps (loose: at least one) right
    RM  rote memorisation           the whole right, and a step (loose: every step) wrong

    score = 1 - IK - 0.5 IG - RM, as shares of the problems; the rate of RM is of CM + RM.

Read is the first letter after the last "Answer", as the authors' script does it, and with it what that does to free
prose: "Because it is so" begins with B. The prompt asks for the form that the script expects.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

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
    listed,
    spread,
)
from metis_agent.types import Question

__all__ = ["HRBench", "VStar", "WeMath", "four_metrics", "read_letter"]

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


_ORDERED_FIELDS = ("question", "answer", "category", "cycle_category")
_LETTERS = "ABCDEFGH"
_TASKS = {"single": "FSP", "cross": "FCP"}
_PUBLISHED = {"Metis-8B": {"4k": 0.835, "8k": 0.820}, "Qwen3-VL-8B": {"4k": 0.789, "8k": 0.746}}


class HRBench:
    """HR-Bench in one resolution or both.

    Args:
        versions: "4k", "8k" or both.
    """

    def __init__(self, versions: tuple[str, ...] = ("4k", "8k")) -> None:
        self.name = "hrbench" if len(versions) > 1 else f"hrbench-{versions[0]}"
        self.source = Source(
            repository="DreamMr/HR-Bench",
            files=tuple(f"hr_bench_{version}.parquet" for version in versions),
            images="image",
            licence="other: see its card",
        )
        self.headline = tuple(f"{version} {part}" for version in versions for part in ("accuracy", "FSP", "FCP"))
        self.published = tuple(
            Published(who=who, values={f"{version} accuracy": values[version] for version in versions})
            for who, values in _PUBLISHED.items()
        )

    def items(self, rows: Iterable[Row]) -> list[Item]:
        """The questions; those that differ by their order alone are one unit."""
        seen: Counter[tuple[str, str]] = Counter()
        found: list[Item] = []
        for number, row in enumerate(rows):
            question = self._question(number, row)
            version, order = question.metadata["version"], question.metadata["order"]
            # The n-th question of each order is the same question, whichever way the file is sorted.
            found.append(Item(question=question, unit=f"{version}-{seen[version, order]}", row=number))
            seen[version, order] += 1
        return found

    def right(self, question: Question, answer: str) -> bool | None:
        """Whether the letter is the right one, in the order that was asked."""
        letter = chosen_letter(answer, question.metadata["options"])
        return None if letter is None else letter == question.answer

    def measures(self, items: Sequence[Item], verdicts: Verdicts) -> dict[str, Measure]:
        """The mean over the orders, for each resolution and task."""
        parts: dict[str, list[list[Item]]] = {}
        for version in sorted({item.question.metadata["version"] for item in items}):
            of_version = [item for item in items if item.question.metadata["version"] == version]
            parts[f"{version} accuracy"] = _by_order(of_version)
            for kind in sorted({item.question.kind for item in of_version}, reverse=True):
                parts[f"{version} {kind}"] = _by_order([item for item in of_version if item.question.kind == kind])
        return spread(items, verdicts, parts)

    def _question(self, number: int, row: Row) -> Question:
        if missing := [name for name in _ORDERED_FIELDS if row.get(name) in (None, "")]:
            raise InputError(f"row {number} of HR-Bench has no {missing[0]!r}; it has {sorted(row)!r}.")
        options = {letter: str(row[letter]) for letter in _LETTERS if row.get(letter) not in (None, "")}
        label = str(row["answer"]).strip().upper()
        if label not in options:
            raise InputError(f"row {number} of HR-Bench has the answer {label!r} and the options {sorted(options)!r}.")
        asked = str(row["question"]).strip()
        text = f"{asked}\n{listed(options)}\nAnswer with the letter of the right option."
        version = "8k" if "8k" in str(row.get("file", "")) else "4k"
        metadata = {
            "options": options, "reference": f"{label}. {options[label]}", "version": version,
            "order": str(row["cycle_category"]),
        }  # fmt: skip
        category = str(row["category"])
        return Question(
            id=item_id(f"hrbench-{version}", number, text, label), text=text, answer=label, verifier="choice",
            kind=_TASKS.get(category, category), metadata=metadata,
        )  # fmt: skip


def _by_order(items: Sequence[Item]) -> list[list[Item]]:
    orders = sorted({item.question.metadata["order"] for item in items})
    return [[item for item in items if item.question.metadata["order"] == order] for order in orders]


_STEP_FIELDS = ("ID", "key", "question", "option", "answer")
_KEY = re.compile(r"([23])steps_(1|2|3|multi)")
_FORM = (
    "This is a multiple-choice problem in mathematics. Describe briefly how you solve it, then give the letter of your "
    "option, in this form:\n<Thought process>: <<how you solve it>> <Answer>: <<letter>>"
)
_MULTI = "multi"


def read_letter(answer: str) -> str | None:
    """The letter that the authors' script reads: the first character after the last "Answer", of A to H."""
    rest = re.sub(r"[><:.]", "", answer.split("Answer")[-1].strip()).strip()
    return rest[0] if rest and rest[0] in "ABCDEFGH" else None


def four_metrics(steps: Sequence[bool], whole: bool) -> dict[str, float]:
    """What one problem counts as, by name: 1 or 0.

    Args:
        steps: Which steps were right.
        whole: Whether the problem asked as a whole was.
    """
    return {
        "IK": float(not whole and not all(steps)),
        "IG": float(not whole and all(steps)),
        "CM strict": float(whole and all(steps)),
        "CM loose": float(whole and any(steps)),
        "RM strict": float(whole and not all(steps)),
        "RM loose": float(whole and not any(steps)),
    }


class WeMath:
    """We-Math, testmini."""

    name = "wemath"
    source = Source(
        repository="We-Math/We-Math",
        files=("data/testmini-*.parquet",),
        images="image_path",
        licence="CC BY-NC 4.0",
    )
    headline: tuple[str, ...] = (
        "score strict",
        "score loose",
        "IK",
        "IG",
        "CM strict",
        "RM strict",
        "CM loose",
        "RM loose",
    )
    published: tuple[Published, ...] = ()
    """The paper's 65.2 (Metis-8B) and 38.8 (Qwen3-VL-8B) do not say which of the scores they are."""

    def items(self, rows: Iterable[Row]) -> list[Item]:
        """The questions; a problem and its steps are one unit."""
        return [self._item(number, row) for number, row in enumerate(rows)]

    def right(self, question: Question, answer: str) -> bool | None:
        """Whether the letter that the authors' script reads is the right one."""
        letter = read_letter(answer)
        return None if letter is None else letter == question.answer

    def measures(self, items: Sequence[Item], verdicts: Verdicts) -> dict[str, Measure]:
        """The four metrics and the scores, then the accuracy on one, two and three steps.

        A problem of which a part could not be judged is left out of the four.
        """
        problems: dict[str, dict[str, Item]] = {}
        for item in items:
            problems.setdefault(item.unit, {})[item.question.metadata["part"]] = item
        found = [_counted(parts, verdicts) for parts in problems.values()]
        # The order in which the authors' tables have them.
        names = ("score strict", "score loose", "IK", "IG", "CM strict", "CM loose")
        measures = {name: _measure([(one[name], 1.0) if one else None for one in found]) for name in names}
        for kind in ("strict", "loose"):
            rates = [(one[f"RM {kind}"], one[f"RM {kind}"] + one[f"CM {kind}"]) if one else None for one in found]
            measures[f"RM {kind}"] = _measure(rates)
        steps = [item for item in items if item.question.metadata["part"] != _MULTI]
        wholes = {count: [item for item in items if item.question.kind == f"{count}-step"] for count in (2, 3)}
        lengths = {"one-step": [steps], "two-step": [wholes[2]], "three-step": [wholes[3]]}
        return {**measures, **spread(items, verdicts, lengths)}

    def _item(self, number: int, row: Row) -> Item:
        if missing := [name for name in _STEP_FIELDS if row.get(name) in (None, "")]:
            raise InputError(f"row {number} of We-Math has no {missing[0]!r}; it has {sorted(row)!r}.")
        key = _KEY.fullmatch(str(row["key"]))
        label = str(row["answer"]).strip()
        if key is None or len(label) != 1 or label not in "ABCDEFGH":
            raise InputError(
                f"row {number} of We-Math has the key {row['key']!r} and the answer {label!r}; keys read "
                "'2steps_1' or '3steps_multi', answers are letters."
            )
        steps, part = key[1], key[2]
        text = f"{_FORM}\n\nQuestion: {row['question']}\nOptions: {row['option']}"
        question = Question(
            id=item_id(self.name, number, text, label), text=text, answer=label, verifier="choice",
            kind=f"{steps}-step" if part == _MULTI else "one-step",
            metadata={"part": part, "steps": int(steps), "problem": str(row["ID"]), "reference": label},
        )  # fmt: skip
        return Item(question=question, unit=f"{steps}steps/{row['ID']}", row=number)


def _counted(parts: Mapping[str, Item], verdicts: Verdicts) -> dict[str, float] | None:
    """What a problem counts as; `None` where a part is missing or was not judged."""
    steps = next(iter(parts.values())).question.metadata["steps"]
    wanted = [*(str(step) for step in range(1, steps + 1)), _MULTI]
    judged = [verdicts.get(parts[part].question.id) if part in parts else None for part in wanted]
    if any(verdict is None for verdict in judged):
        return None
    one = four_metrics([bool(verdict) for verdict in judged[:-1]], bool(judged[-1]))
    scores = {f"score {kind}": 1 - one["IK"] - 0.5 * one["IG"] - one[f"RM {kind}"] for kind in ("strict", "loose")}
    return {**scores, **one}


def _measure(pairs: Sequence[tuple[float, float] | None]) -> Measure:
    table = np.array([pair or (0.0, 0.0) for pair in pairs], dtype=np.float64).reshape(-1, 2)
    return Measure(right=table[None, :, 0], of=table[None, :, 1])
