"""The audit's figures, whole and by kind of question.

Shares are those of the sample, totals are scaled up to all turns with calls. Where a person has checked verdicts, the
headline's share and totals are corrected. Where nobody labelled the questions, their kinds are clusters of their words,
each named by the words that set it apart.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.audit.accounting import AuditedCall, AuditedTurn, Use, harmful_rounds, uses
from metis_agent.audit.frontier import Resampled, corrected_ratio
from metis_agent.evaluation.agents import Estimate

__all__ = ["Check", "Figures", "Row", "figures_of", "kinds_of"]

_MOST = 8
_FEWEST = 12
"""Questions; of fewer no clusters are made."""
_NAMED_BY = 3
_WORD = re.compile(r"[^\W\d_]{2,}|\d+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")
_OTHER = "other"


def kinds_of(questions: Sequence[str], labels: Sequence[str], *, seed: int = 0) -> list[str]:
    """A kind for each question: its label where any question has one, else the name of its cluster.

    Args:
        questions: Their texts.
        labels: "" where a question has none.
        seed: Of the clustering.

    Returns:
        Names; all empty where there are too few questions, or scikit-learn is not installed.
    """
    if any(labels):
        return [label or _OTHER for label in labels]
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
    except ImportError:
        return [""] * len(questions)
    texts = [" ".join(word for word in _words(it) if word not in ENGLISH_STOP_WORDS) for it in questions]
    if len(set(texts)) < _FEWEST:
        return [""] * len(questions)
    # Words that half of the questions have tell none apart, nor does one that stands in a single question.
    words = TfidfVectorizer(token_pattern=r"\S+", min_df=2, max_df=0.5, sublinear_tf=True)
    try:
        x = words.fit_transform(texts)
    except ValueError:  # no word is in two questions
        return [""] * len(questions)
    count = min(_MOST, max(2, round((len(questions) / 6) ** 0.5)), len(set(texts)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer kinds than were looked for are no fault
        clusters = KMeans(n_clusters=count, n_init=4, random_state=seed).fit_predict(x)
    names = _names(texts, clusters.tolist())
    return [names[cluster] for cluster in clusters]


def _names(texts: Sequence[str], clusters: Sequence[int]) -> dict[int, str]:
    """By the commonest words of each cluster that are commoner in it than elsewhere."""
    everywhere = Counter(word for text in texts for word in set(text.split()))
    names: dict[int, str] = {}
    for cluster in sorted(set(clusters)):
        inside = [text for text, its in zip(texts, clusters, strict=True) if its == cluster]
        here = Counter(word for text in inside for word in set(text.split()))

        def worth(word: str, here: Counter[str] = here) -> tuple[float, int, str]:
            return here[word] ** 2 / everywhere[word], here[word], word

        best = sorted((word for word in here if not word.isdigit()), key=worth, reverse=True)[:_NAMED_BY]
        name = ", ".join(best) or _OTHER
        names[cluster] = name if name not in names.values() else f"{name} ({cluster + 1})"
    return names


def _words(question: str) -> list[str]:
    """Words in lower case; of scripts without spaces, pairs of characters."""
    found = []
    for word in _WORD.findall(question[:2_000].casefold()):
        found += [word[i : i + 2] for i in range(len(word) - 1)] if _CJK.match(word) else [word]
    return found


Float = NDArray[np.float64]
_SHARES: tuple[Use, ...] = ("redundant", "necessary", "lost")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Reading calls of one tool, one position in the run, or one kind of question."""

    name: str
    calls: int
    """In the sample."""
    redundant: Estimate
    necessary: Estimate
    lost: Estimate
    """Made in runs that were not right at any state."""
    harmful: Estimate
    """Redundant ones that took a right answer away."""
    dollars: float
    """What the redundant ones cost, in all turns."""
    seconds: float


_DOUBTFUL = 0.1
"""Share of the calls without a verdict from which on the others are no fair sample."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A person's verdicts on turns that were drawn at random from those that a judge ruled on."""

    turns: Mapping[str, AuditedTurn]
    """The checked turns with the person's verdicts in place of the judge's, by id."""
    fallible: frozenset[str]
    """All turns that a judge ruled on."""
    pairs: int = 0
    """Verdicts that were checked."""
    wrong: int = 0
    """Of these, how many the judge had otherwise."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the audit says."""

    turns: int
    """Turns that the store holds."""
    calls: int
    """Their reading calls."""
    sampled: int
    """Turns with calls that were audited and have their verdicts; shares are theirs."""
    undecided: int
    """Turns that were drawn and lack a verdict; they are left out."""
    undecided_calls: int
    """Their reading calls."""
    redundant: Estimate
    judged: Estimate
    """The same as the judge ruled, where a person's check has corrected `redundant`."""
    necessary: Estimate
    lost: Estimate
    harmful: Estimate
    dollars: Estimate
    """What redundant calls cost in all turns; without the tokens that have no price."""
    seconds: Estimate
    tokens: Estimate
    unpriced: float
    """Share of those tokens whose price is unknown."""
    guessed: float
    """Share of those tokens that were guessed from the length of texts."""
    by_tool: Sequence[Row]
    by_position: Sequence[Row]
    by_kind: Sequence[Row]
    checked: int = 0
    """Turns that a person has checked."""
    checked_pairs: int = 0
    judge_wrong: int = 0

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest share of redundant calls, whatever the missing verdicts are.

        What has no verdict is no fair sample: equal texts need no judge, so where a judge is down they alone are left.
        Source: worst-case bounds for missing outcomes (Manski, 1989).
        """
        known = (self.redundant.value or 0.0) * self.redundant.questions
        calls = max(1, self.redundant.questions + self.undecided_calls)
        return known / calls, (known + self.undecided_calls) / calls

    @property
    def doubtful(self) -> bool:
        """True where so many calls have no verdict that a single figure would mislead."""
        low, high = self.bounds
        return high - low > _DOUBTFUL

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"bounds": self.bounds}


def figures_of(
    turns: Sequence[AuditedTurn],
    *,
    all_turns: int,
    all_calls: int,
    all_with_calls: int,
    check: Check | None = None,
    seed: int = 0,
) -> Figures:
    """The figures of a sample of turns.

    Args:
        turns: The sample, decided or not.
        all_turns: Turns of the store.
        all_calls: Reading calls of the store.
        all_with_calls: Turns of the store from which the sample was drawn.
        check: A person's verdicts.
        seed: Of the bootstrap.
    """
    decided = [turn for turn in turns if turn.decided]
    scale = all_with_calls / len(decided) if decided else 1.0
    table = _Table(decided, seed)
    shares = {use: table.share(use) for use in _SHARES}
    judged = redundant = shares["redundant"]
    if check is not None and check.turns:
        redundant = _corrected(table, check, seed)
    factor = (redundant.value or 0.0) / judged.value if judged.value else 1.0
    amounts = {
        name: _rescaled(table.resampled.total(table.amounts[name], scale), factor, redundant if check else None)
        for name in ("dollars", "seconds", "tokens")
    }
    tokens = float(table.amounts["tokens"].sum())
    return Figures(
        turns=all_turns, calls=all_calls, sampled=len(decided), undecided=len(turns) - len(decided),
        undecided_calls=sum(
            call.effect == "reads" for turn in turns if not turn.decided for calls in turn.rounds for call in calls
        ),
        redundant=redundant, judged=judged, necessary=shares["necessary"], lost=shares["lost"],
        harmful=table.share("harmful"), **amounts,
        unpriced=float(table.amounts["unpriced"].sum()) / tokens if tokens else 0.0,
        guessed=float(table.amounts["guessed"].sum()) / tokens if tokens else 0.0,
        by_tool=table.rows(lambda _, __, call: call.tool, scale, by_size=True),
        by_position=table.rows(lambda _, position, __: position + 1, scale),
        by_kind=table.rows(lambda turn, _, __: turn.kind, scale, by_size=True),
        checked=len(check.turns) if check else 0, checked_pairs=check.pairs if check else 0,
        judge_wrong=check.wrong if check else 0,
    )  # fmt: skip


class _Table:
    """Reading calls of decided turns, summed by turn."""

    def __init__(self, turns: Sequence[AuditedTurn], seed: int) -> None:
        self.turns, self._seed = turns, seed
        self._groups = [turn.group for turn in turns]
        self.resampled = Resampled(self._groups, seed=seed)
        self._entries = [list(_entries(turn)) for turn in turns]
        self.counts = _counts(self._entries)
        self.amounts = {
            name: np.array(
                [sum(getattr(call.amount, name) for _, call, use, _ in entries if use == "redundant")
                 for entries in self._entries], dtype=np.float64,
            )
            for name in ("dollars", "seconds", "tokens", "unpriced", "guessed")
        }  # fmt: skip

    def share(self, use: str) -> Estimate:
        return self.resampled.ratio(self.counts[use], self.counts["calls"])

    def rows(
        self, key_of: Callable[[AuditedTurn, int, AuditedCall], Hashable], scale: float, *, by_size: bool = False
    ) -> list[Row]:
        """A row for each value of a key, in its order or the largest first."""
        parts: dict[Any, dict[int, list[_Entry]]] = defaultdict(lambda: defaultdict(list))
        for number, (turn, entries) in enumerate(zip(self.turns, self._entries, strict=True)):
            for entry in entries:
                parts[key_of(turn, entry[0], entry[1])][number].append(entry)
        rows = [self._row(str(key), of_turn, scale) for key, of_turn in sorted(parts.items(), key=lambda it: it[0])]
        return sorted(rows, key=lambda row: -row.calls) if by_size else rows

    def _row(self, name: str, of_turn: Mapping[int, list[_Entry]], scale: float) -> Row:
        counts = _counts(list(of_turn.values()))
        resampled = Resampled([self._groups[number] for number in of_turn], seed=self._seed)
        shares = {use: resampled.ratio(counts[use], counts["calls"]) for use in (*_SHARES, "harmful")}
        spared = [call.amount for entries in of_turn.values() for _, call, use, _ in entries if use == "redundant"]
        return Row(
            name=name, calls=round(counts["calls"].sum()), **shares,
            dollars=scale * sum(amount.dollars for amount in spared),
            seconds=scale * sum(amount.seconds for amount in spared),
        )  # fmt: skip


_Entry = tuple[int, AuditedCall, Use, bool]
"""Position from 0, the call, what it was for, and whether its round was harmful."""


def _entries(turn: AuditedTurn) -> Iterator[_Entry]:
    """The reading calls of a turn whose use is known."""
    for position, (calls, labels, harmful) in enumerate(
        zip(turn.rounds, uses(turn), harmful_rounds(turn), strict=True)
    ):
        for call, use in zip(calls, labels, strict=True):
            if use in _SHARES:
                yield position, call, use, harmful


def _counts(entries: Sequence[Sequence[_Entry]]) -> dict[str, Float]:
    """[N] each: calls, those of each use, and harmful ones."""
    counts: dict[str, Float] = {
        use: np.array([sum(it[2] == use for it in of_turn) for of_turn in entries], dtype=np.float64) for use in _SHARES
    }
    counts["harmful"] = np.array([sum(it[3] for it in of_turn) for of_turn in entries], dtype=np.float64)
    counts["calls"] = np.array([len(of_turn) for of_turn in entries], dtype=np.float64)
    return counts


def _corrected(table: _Table, check: Check, seed: int) -> Estimate:
    place = {turn.id: row for row, turn in enumerate(table.turns)}
    rows = [place[id_] for id_ in check.turns if id_ in place]
    person = [
        sum(use == "redundant" for _, _, use, _ in _entries(turn)) for id_, turn in check.turns.items() if id_ in place
    ]
    return corrected_ratio(
        table.counts["redundant"], table.counts["calls"], np.array(rows, dtype=np.int64),
        np.array(person, dtype=np.float64), [turn.group for turn in table.turns],
        fallible=np.array([turn.id in check.fallible for turn in table.turns], dtype=bool), seed=seed,
    )  # fmt: skip


def _rescaled(total: Estimate, factor: float, corrected: Estimate | None) -> Estimate:
    """A total by the corrected share; its interval is then as wide as the share's, where that is wider."""
    if total.value is None or corrected is None or not corrected.value:
        return total
    value = factor * total.value
    low = min((total.low or 0.0) * factor, value * (corrected.low or 0.0) / corrected.value)
    high = max((total.high or 0.0) * factor, value * (corrected.high or 0.0) / corrected.value)
    return replace(total, value=value, low=low, high=high)
