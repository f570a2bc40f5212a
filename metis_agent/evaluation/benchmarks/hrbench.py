"""HR-Bench: questions about photographs of 4K and 8K, each asked with its four options in four orders.

Source: DreamMr/HR-Bench (Wang et al., arXiv:2408.15556). The rows hold the orders (`cycle_category`); the score of an
order is the share of right answers, and the benchmark's the mean over the orders: of all, of single objects (FSP) and
of several (FCP). A model that likes a letter is so found out. Its own script has a language model say yes or no to each
answer; here the letter that the answer commits to decides, and a judge where there is none (`--judge`).
"""

from __future__ import annotations

from collections import Counter
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
    listed,
    spread,
)
from metis_agent.types import Question

__all__ = ["HRBench"]

_FIELDS = ("question", "answer", "category", "cycle_category")
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
        if missing := [name for name in _FIELDS if row.get(name) in (None, "")]:
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
