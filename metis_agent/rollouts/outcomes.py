"""Outcome tables: for each question, what came of answering directly and of each tool.

Where it stands: records -> **outcomes** -> `gate_trainer` and `gate_evaluation`. For a gate the executor is
frozen, so these records are all that training needs: no model is called. One row a question, `question`,
optional `context`, for each branch `<branch>_correct` in 0..1 and optional `<branch>_cost`, `<branch>_seconds`,
`<branch>_answer`, and what a direct draft showed before the decision: numbers `draft_*` and `draft_answer`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError

__all__ = ["DIRECT", "MIN_ROWS", "OutcomeTable", "check_unseen", "held_out", "question_key"]

DIRECT = "direct"
"""The name of the action that calls no tool; always action 0."""
MIN_ROWS = 40
"""Fewer rows can neither train a gate nor say how good it is."""


@dataclass(frozen=True, kw_only=True)
class OutcomeTable:
    """N questions and A actions: `direct`, then the tools.

    Raises:
        InputError: shapes differ, or a value is out of its range.
    """

    questions: tuple[str, ...]
    actions: tuple[str, ...]
    correct: NDArray[np.float64]
    """[N, A], in [0, 1]: share of right answers down each branch."""
    cost: NDArray[np.float64]
    """[N, A], at least 0, in the caller's unit; 0 for direct and 1 a tool by default."""
    seconds: NDArray[np.float64]
    """[N, A]; NaN where not recorded."""
    contexts: tuple[str, ...] = ()
    """What came with each question (a table, a passage); empty where the table has none."""
    groups: tuple[str, ...] = ()
    """Rows of one group never part ways into train and test; the question itself by default."""
    draft: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """By name, [N]: what a direct draft showed before the decision; NaN where there was no draft."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Records that could not be used, by reason."""

    def __post_init__(self) -> None:
        shape = len(self.questions), len(self.actions)
        for name in ("correct", "cost", "seconds"):
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} is {getattr(self, name).shape!r}: [N, A] must be {shape!r}.")
        for name in ("contexts", "groups"):
            if len(getattr(self, name)) not in (0, shape[0]):
                raise InputError(f"{name} has {len(getattr(self, name))!r} entries for {shape[0]} questions: one each.")
        if shape[1] < 2 or self.actions[0] != DIRECT:
            raise InputError(
                f"The branches are {self.actions!r}: there must be {DIRECT!r} and at least one tool. "
                "Name them with --direct BRANCH and --tool NAME=BRANCH."
            )
        for action, column in zip(self.actions, self.correct.T, strict=True):
            _check_values(f"correct of {action!r}", column, high=1.0)
        for action, column in zip(self.actions, self.cost.T, strict=True):
            _check_values(f"cost of {action!r}", column)
        if blank := [row for row, text in enumerate(self.questions) if not text.strip()]:
            raise InputError(f"Row {blank[0]} has a blank question; every row needs one.")

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def tools(self) -> tuple[str, ...]:
        """The actions but the first."""
        return self.actions[1:]

    @property
    def saving(self) -> NDArray[np.float64]:
        """[A]: c = 1 / (1 + cost of direct) - 1 / (1 + cost of the action), mean costs; 0 for direct.

        The efficiency reward that a right answer forgoes by this action. Its mean cost is used because a price
        has to be known before the decision.
        """
        reward = 1.0 / (1.0 + self.cost.mean(axis=0))
        return np.asarray(reward[0] - reward)

    @property
    def keys(self) -> tuple[str, ...]:
        """[N]: see `question_key`."""
        contexts = self.contexts or ("",) * len(self)
        return tuple(map(question_key, self.questions, contexts))

    def take(self, rows: NDArray[np.int64] | Sequence[int]) -> OutcomeTable:
        """The rows given, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        return OutcomeTable(
            questions=tuple(self.questions[row] for row in index),
            actions=self.actions,
            correct=self.correct[index],
            cost=self.cost[index],
            seconds=self.seconds[index],
            contexts=tuple(self.contexts[row] for row in index) if self.contexts else (),
            groups=tuple(self.groups[row] for row in index) if self.groups else (),
            draft={name: column[index] for name, column in self.draft.items()},
        )

    def check_trainable(self) -> None:
        """Refuse what no gate can learn from.

        Raises:
            InputError: too few rows, no branch whose outcome varies, branches that always agree, or one question in
                two groups.
        """
        if len(self) < MIN_ROWS:
            raise InputError(
                f"The table has {len(self)} rows: a gate needs at least {MIN_ROWS} to be trained and judged, "
                "and a few hundred to be any good. Record more questions."
            )
        if not np.ptp(self.correct, axis=0).any():
            outcomes = dict(zip(self.actions, map(float, self.correct[0]), strict=True))
            raise InputError(
                f"Each branch has the same outcome on all {len(self)} rows, {outcomes!r}: there is nothing to predict. "
                "Record questions on which a branch sometimes fails and sometimes succeeds, or use a fixed gate "
                "(NeverGate, AlwaysGate)."
            )
        for action, column in zip(self.tools, self.correct.T[1:], strict=True):
            if np.array_equal(column, self.correct[:, 0]):
                raise InputError(
                    f"Branch {action!r} has exactly the outcomes of {DIRECT!r} on all rows: the tool changes "
                    "nothing, so never calling it is best. Check that the two branches are not one column."
                )
        self._check_groups()

    def _check_groups(self) -> None:
        homes: dict[str, str] = {}
        for row, (key, group) in enumerate(zip(self.keys, self.groups, strict=False)):
            if homes.setdefault(key, group) != group:
                raise InputError(
                    f"The question {self.questions[row]!r} is in groups {homes[key]!r} and {group!r}: folds "
                    "would leak. Give it one group, drop one of the rows, or name the text that tells them "
                    "apart with --context COLUMN."
                )

    def folds(self, count: int, seed: int) -> NDArray[np.int64]:
        """[N]: which of `count` folds each row is in; all rows of a group, and of a question, in one.

        Raises:
            InputError: there are fewer groups than folds.
        """
        labels, index = np.unique(self.groups or self.keys, return_inverse=True)
        if len(labels) < count:
            raise InputError(
                f"There are {len(labels)} groups for {count} folds: each fold needs one. Use a finer --group-by."
            )
        return np.asarray((np.random.default_rng(seed).permutation(len(labels)) % count)[index])


def check_unseen(table: OutcomeTable, trained_on: Iterable[str]) -> NDArray[np.bool_]:
    """[N]: rows whose question is not among `trained_on` (see `OutcomeTable.keys`).

    Raises:
        InputError: no row is unseen.
    """
    seen = frozenset(trained_on)
    unseen = np.array([key not in seen for key in table.keys])
    if not unseen.any():
        raise InputError(
            f"All {len(table)} questions were trained on: nothing said of them holds for new ones. Use rows that "
            "were held out of training."
        )
    return unseen


def held_out(table: OutcomeTable, share: float, seed: int) -> NDArray[np.bool_]:
    """[N]: a share of the groups (of the questions, where there are none), the same at every call.

    Raises:
        ConfigurationError: the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ConfigurationError(f"The share to hold out is {share!r}; it is at least 0 and below 1, such as 0.3.")
    homes = table.groups or table.keys
    return np.array(
        [zlib.crc32(f"held out {seed} {home}".encode(errors="surrogatepass")) < share * 2**32 for home in homes],
        dtype=np.bool_,
    )


def question_key(question: str, context: str = "") -> str:
    """16 hex digits that are the same for the same question and context, but for case and spaces."""
    text = f"{_plain(question)}\x1f{_plain(context)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _check_values(what: str, column: NDArray[np.float64], high: float = np.inf) -> None:
    if (bad := np.flatnonzero(~((column >= 0) & (column <= high) & np.isfinite(column)))).size:
        rule = "in 0..1" if high == 1 else "finite and at least 0"
        raise InputError(
            f"The {what} is {float(column[bad[0]])!r} in row {bad[0]} ({bad.size} such rows): it must be a number "
            f"{rule}. Leave out rows without an outcome."
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
