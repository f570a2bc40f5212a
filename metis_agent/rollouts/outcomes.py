"""Outcome tables: for each question, what came of answering directly and of each tool.

Where it stands: records -> **outcomes** -> `gate_trainer` and `evaluation.gates`. For a gate the executor is
frozen, so these records are all that training needs: no model is called. One row a question: `question`, optional
`context` and `history` (the conversation before it), for each branch `<branch>_correct` in 0..1 and optional
`<branch>_cost`, `<branch>_seconds`, `<branch>_answer`, and what a direct draft showed before the decision: numbers
`draft_*` and `draft_answer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.gates.features import agreement, draft_text_features
from metis_agent.gates.reading import conversation_before, observed
from metis_agent.gates.scorers import background
from metis_agent.rollouts.questions import read_rows

__all__ = [
    "CONTEXT_COLUMNS",
    "DIRECT",
    "MIN_ROWS",
    "OutcomeTable",
    "check_unseen",
    "held_out",
    "question_key",
    "read_outcomes",
]

DIRECT = "direct"
"""The name of the action that calls no tool; always action 0."""
MIN_ROWS = 40
"""Fewer rows can neither train a gate nor say how good it is."""
_TEXTS = ("questions", "contexts", "histories", "groups", "runs", "observations", "drafts")


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
    histories: tuple[str, ...] = ()
    """The conversation before each question, as `gates.reading.conversation_before` writes it; empty without any."""
    runs: tuple[str, ...] = ()
    """[N] for decision points: the run that a row is a state of, its states in order. `correct` is then what answering
    there gave, and in all other columns what going on gave; `cost` is what was left to pay. Empty for questions."""
    observations: tuple[str, ...] = ()
    """[N] for decision points: what the tools had brought by then, as `gates.reading.observed` writes it."""
    groups: tuple[str, ...] = ()
    """Rows of one group never part ways into train and test; the question itself by default."""
    draft: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """By name, [N]: what a direct draft showed before the decision; NaN where there was none. `drafts` has its text."""
    drafts: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """That answered, by their providers' names; empty where nobody knows."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Records that could not be used, by reason."""

    def __post_init__(self) -> None:
        shape = len(self.questions), len(self.actions)
        for name in ("correct", "cost", "seconds"):
            if getattr(self, name).shape != shape:
                raise InputError(f"{name} is {getattr(self, name).shape!r}: [N, A] must be {shape!r}.")
        for name in _TEXTS:
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
        begins = [row for row, run in enumerate(self.runs) if not row or self.runs[row - 1] != run]
        if len(begins) != len({*self.runs}) or bool(self.runs) != bool(self.observations):
            raise InputError(
                "Decision points have a run each, its states in order, and what tools had brought by then."
            )
        for name in ("questions", "groups", "runs"):
            if blank := [row for row, text in enumerate(getattr(self, name)) if not text.strip()]:
                raise InputError(f"Row {blank[0]} has a blank {name[:-1]}; every row needs one.")

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
        return tuple(map(question_key, self.questions, contexts, map(self.said, range(len(self)))))

    @property
    def asked(self) -> tuple[str, ...]:
        """[N]: keys of question, context and conversation; other than `keys` only for decision points."""
        nothing = ("",) * len(self)
        return tuple(map(question_key, self.questions, self.contexts or nothing, self.histories or nothing))

    @property
    def homes(self) -> tuple[str, ...]:
        """[N]: what each row is drawn with: its group, or its question."""
        return self.groups or self.asked

    @property
    def steps(self) -> NDArray[np.int64]:
        """[N]: calls before each row's decision, as many as are read; 0 for questions."""
        return np.array([text.count("\n") + bool(text) for text in self.observations or ("",) * len(self)])

    def said(self, row: int) -> str:
        """What a gate reads of the conversation and of the tools' results."""
        return "\n".join(column[row] for column in (self.histories, self.observations) if column and column[row])

    def background(self, row: int) -> str:
        """What a model reads of a row beside the question: the conversation, then the context."""
        return background(self.said(row), self.contexts[row] if self.contexts else "")

    def take(self, rows: NDArray[np.int64] | Sequence[int]) -> OutcomeTable:
        """The rows given, in that order."""
        index = np.asarray(rows, dtype=np.int64)
        texts: dict[str, Any] = {
            name: tuple(column[row] for row in index) for name in _TEXTS if (column := getattr(self, name))
        }
        draft = {name: column[index] for name, column in self.draft.items()}
        numbers = {name: getattr(self, name)[index] for name in ("correct", "cost", "seconds")}
        return replace(self, **numbers, draft=draft, dropped={}, **texts)

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
        labels, index = np.unique(self.homes, return_inverse=True)
        if len(labels) < count:
            raise InputError(f"There are {len(labels)} groups for {count} folds: each needs one. Use finer groups.")
        return np.asarray((np.random.default_rng(seed).permutation(len(labels)) % count)[index])


def check_unseen(table: OutcomeTable, trained_on: Iterable[str]) -> NDArray[np.bool_]:
    """[N]: rows whose question is not among `trained_on` (see `OutcomeTable.keys`).

    Raises:
        InputError: no row is unseen.
    """
    seen = frozenset(trained_on)
    unseen = np.array([key not in seen for key in table.asked])
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
    return np.array(
        [zlib.crc32(f"held out {seed} {home}".encode(errors="surrogatepass")) < share * 2**32 for home in table.homes],
        dtype=np.bool_,
    )


def question_key(question: str, context: str = "", history: str = "") -> str:
    """16 hex digits that are the same for the same question, context and conversation, but for case and spaces."""
    text = f"{_plain(question)}\x1f{_plain(context)}" + (f"\x1f{_plain(history)}" if history else "")
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


CONTEXT_COLUMNS = ("context", "table", "text", "passage")
"""Columns taken as the question's context where none are named."""

HISTORY_COLUMN = "history"
"""The conversation before the question: messages with "role" and "content", as JSON or not; or the user's own text."""

POINT_COLUMNS = ("run", "observations")
"""Columns that make a table one of decision points: which run a row is a state of, and what its calls had brought by
then, a list of {"tool", "content", "failed"} or that as JSON. All tools then share a branch, that of going on."""

Columns = Mapping[str, Sequence[Any]]


def read_outcomes(
    path: str | Path,
    *,
    direct: str = "direct",
    tools: Mapping[str, str],
    context: Sequence[str] | None = None,
    group_by: str | None = None,
) -> OutcomeTable:
    """Read a table of outcomes.

    Args:
        path: A `.parquet`, `.csv` or `.jsonl` file, or one of a registered format.
        direct: Branch of the direct answers: the table has `<direct>_correct`.
        tools: Tool name -> branch.
        context: Columns that, joined by line breaks, are what came with the question; by default those of
            `CONTEXT_COLUMNS` that the table has.
        group_by: Column whose rows stay together when splitting; the question by default.

    Numbers in columns `draft_*` become features. So do a few facts about the text `draft_answer`, and, where direct
    answers are recorded too, how far the two agree (`draft_agreement`, `draft_containment`).

    Raises:
        ConfigurationError: no tool, a column named that is not there, or a format that is not read.
        InputError: the file can't be read, has no branches, or a value is out of its range.
    """
    table = _columns(Path(path))
    names = sorted(table)
    branches = {DIRECT: direct, **tools}
    _check_columns(names, branches, [*(context or ()), *([group_by] if group_by else [])])
    points = set(POINT_COLUMNS) <= table.keys()
    shared = len(set(branches.values())) < len(branches) and (not points or direct in tools.values())
    if DIRECT in tools or shared:
        raise ConfigurationError(
            f"The branches are {branches!r}: each action needs a branch of its own, and no tool may be named "
            f"{DIRECT!r}."
        )
    questions = _texts(table, "question")
    used = [name for name in (CONTEXT_COLUMNS if context is None else context) if name in names]
    return OutcomeTable(
        questions=questions,
        actions=tuple(branches),
        correct=_stack(table, branches, "correct"),
        cost=_stack(table, branches, "cost", [0.0] + [1.0] * len(tools)),
        seconds=_stack(table, branches, "seconds", [np.nan] * len(branches)),
        contexts=tuple(map("\n".join, zip(*(_texts(table, name) for name in used), strict=True))) if used else (),
        runs=_texts(table, "run") if points else (),
        observations=tuple(map(_observations, table["observations"])) if points else (),
        histories=tuple(map(_conversation, table[HISTORY_COLUMN])) if HISTORY_COLUMN in table else (),
        groups=_texts(table, group_by) if group_by else (),
        draft=_draft(table, questions, f"{direct}_answer"),
        drafts=_texts(table, "draft_answer") if "draft_answer" in table else (),
        models=tuple(sorted({*_texts(table, "model")} - {""})) if "model" in table else (),
    )


def _columns(path: Path) -> dict[str, list[Any]]:
    """The table by column; an entry is `None` where a row has none, or in a CSV an empty one where a number belongs."""
    columns: dict[str, list[Any]] = {}
    rows = 0
    for row in read_rows(path):
        for name in row.keys() - columns.keys():
            columns[name] = [None] * rows
        for name, column in columns.items():
            column.append(row.get(name))
        rows += 1
    if not rows:
        raise InputError(f"{str(path)!r} has no rows; record some outcomes first.")
    return columns


def _check_columns(names: Sequence[str], branches: Mapping[str, str], extra: Sequence[str]) -> None:
    recorded = sorted(name.removesuffix("_correct") for name in names if name.endswith("_correct"))
    if "question" not in names:
        raise InputError(f"The table has no column 'question'; it has {names!r}. Rename the one with the questions.")
    if not recorded:
        raise InputError(
            f"The table has no branches: no column ends in '_correct' among {names!r}. Record for each question "
            "whether the direct answer was right and whether each tool's was, in 0..1."
        )
    if len(branches) < 2:
        raise ConfigurationError(f"No tool is named; name one with --tool NAME=BRANCH, of the branches {recorded!r}.")
    for action, branch in branches.items():
        if branch not in recorded:
            option = "--direct" if action == DIRECT else f"--tool {action}="
            raise ConfigurationError(
                f"{option} names the branch {branch!r}, and the table has no column '{branch}_correct'. Its "
                f"branches are {recorded!r}."
            )
    for name in extra:
        if name not in names:
            raise ConfigurationError(f"The table has no column {name!r}; it has {names!r}.")


def _conversation(value: Any) -> str:
    listed = _listed(value)
    messages = [{"role": "user", "content": listed}] if isinstance(listed, str) else listed
    return conversation_before(_checked(messages, "history", {"content"}))


def _observations(value: Any) -> str:
    calls = _checked(_listed(value), "observations", {"tool", "content"})
    return observed((str(call["tool"]), str(call["content"]), bool(call.get("failed"))) for call in calls)


def _listed(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return [] if value is None or (isinstance(value, str) and not value) else value


def _checked(cell: Any, column: str, keys: set[str]) -> list[Mapping[str, Any]]:
    entries: list[Any] = [cell] if isinstance(cell, str) else list(cell)
    if not all(isinstance(entry, Mapping) and keys <= entry.keys() for entry in entries):
        raise InputError(f"Column {column!r} holds {cell!r:.200}: it must be a list of objects with {sorted(keys)!r}.")
    return entries


def _texts(table: Columns, name: str) -> tuple[str, ...]:
    return tuple("" if value is None or value != value else str(value) for value in table[name])  # NaN is no text


def _numbers(table: Columns, name: str) -> NDArray[np.float64]:
    try:
        return np.array([_number(cell) for cell in table[name]], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"Column {name!r} holds something that is no number: {error}.") from error


def _number(cell: Any) -> float:
    """NaN for an empty cell; what a CSV writes of a boolean is what other tables have of it."""
    return np.nan if cell in (None, "") else float({"true": 1, "false": 0}.get(str(cell).lower(), cell))


def _stack(
    table: Columns, branches: Mapping[str, str], what: str, default: Sequence[float] | None = None
) -> NDArray[np.float64]:
    columns = []
    for index, branch in enumerate(branches.values()):
        if f"{branch}_{what}" in table or default is None:
            columns.append(_numbers(table, f"{branch}_{what}"))
        else:
            columns.append(np.full(len(table["question"]), default[index]))
    return np.stack(columns, axis=1)


def _draft(table: Columns, questions: Sequence[str], answers: str) -> dict[str, NDArray[np.float64]]:
    columns = {name: _numbers(table, name) for name in sorted(table) if _is_draft_number(name, table[name])}
    for name, column in columns.items():
        if np.isinf(column).any():
            raise InputError(f"Column {name!r} holds an infinite number; leave a cell empty where there is none.")
    if "draft_answer" in table:
        drafts = table["draft_answer"]
        rows = [
            None if text is None else draft_text_features(q, str(text))
            for q, text in zip(questions, drafts, strict=True)
        ]
        columns |= _from_rows(rows)
        if answers in table:
            pairs = zip(drafts, table[answers], strict=True)
            columns |= _from_rows([None if a is None else agreement(str(a), str(b or "")) for a, b in pairs])
    return {name: column for name, column in columns.items() if not np.isnan(column).all()}


def _is_draft_number(name: str, column: Sequence[Any]) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        return name.startswith("draft_") and name != "draft_answer" and not np.isnan([*map(_number, column)]).all()
    return False


def _from_rows(rows: Sequence[Mapping[str, float] | None]) -> dict[str, NDArray[np.float64]]:
    names = next((list(row) for row in rows if row is not None), [])
    return {name: np.array([np.nan if row is None else row[name] for row in rows], dtype=np.float64) for name in names}
