"""How a gate ranks questions, with intervals, and by how much it beats another gate on the same questions.

Beside `gate_evaluation`. Several scorings of the same questions (one a seed of the folds) count as one method: a
figure is their mean, and one bootstrap over groups of questions gives the interval of that mean. Two methods are
compared on the same resamples, so what makes a question hard for both does not widen the interval of their gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_agent.hdpo.gate_evaluation import Scored, accuracy_at_rate, area_under_curve
from metis_agent.hdpo.outcomes import OutcomeTable
from metis_agent.hdpo.resamples import Resamples, interval_of

__all__ = ["FIGURES", "compare_rankings", "ranking_figures"]

Float = NDArray[np.float64]
Index = NDArray[np.int64]
FIGURES = ("auc", "auc_benefit", "accuracy_at_half", "half_minus_always")


def ranking_figures(scored: Scored, table: OutcomeTable, index: Index) -> tuple[float, ...]:
    """One number for each of `FIGURES`, of the rows given.

    - auc: of the estimated P(direct answer right).
    - auc_benefit: of the need for the tool, where just one branch is right.
    - accuracy_at_half: the tool called on the half of the questions that need it most.
    - half_minus_always: that, less the accuracy of always calling.
    """
    direct, tool = table.correct[index, 0], table.correct[index, scored.tool[index]]
    need, win = scored.need[index], (1 + np.sign(tool - direct)) / 2
    half = accuracy_at_rate(need, direct, tool, 0.5)
    return (
        area_under_curve(scored.direct_right[index], direct),
        area_under_curve(need, win, np.abs(tool - direct)),
        half,
        half - float(tool.mean()),
    )


def compare_rankings(
    methods: Mapping[str, Sequence[Scored]], table: OutcomeTable, resamples: Resamples, *, reference: str
) -> dict[str, dict[str, Any]]:
    """Figures of each method with intervals, and by how much the `reference` is above it.

    Args:
        methods: By name, the scorings of `table` that are one method's.
        table: The questions.
        resamples: Of the table's questions.
        reference: The method that the others are compared with.

    Returns:
        By method and then figure: `<figure>`, `<figure>_seeds`, `<figure>_interval` and, but for the reference's
        own, `<figure>_below_reference` and its `_interval`.
    """
    rows = np.arange(len(table))

    def each_seed(name: str, index: Index) -> Float:
        return np.array([ranking_figures(one, table, index) for one in methods[name]])

    def mean(name: str) -> Float:
        return resamples.values(lambda index: each_seed(name, index).mean(axis=0))

    ours, ours_drawn = each_seed(reference, rows).mean(axis=0), mean(reference)
    found: dict[str, dict[str, Any]] = {}
    for name in methods:
        seeds, drawn = each_seed(name, rows), ours_drawn if name == reference else mean(name)
        row: dict[str, Any] = {}
        for place, figure in enumerate(FIGURES):
            row[figure] = float(seeds[:, place].mean())
            row[f"{figure}_seeds"] = seeds[:, place].tolist()
            row[f"{figure}_interval"] = interval_of(drawn[:, place])
            if name != reference:
                row[f"{figure}_below_reference"] = float(ours[place] - row[figure])
                row[f"{figure}_below_reference_interval"] = interval_of(ours_drawn[:, place] - drawn[:, place])
        found[name] = row
    return found
