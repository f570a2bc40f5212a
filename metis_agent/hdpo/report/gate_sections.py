"""The parts of the page that are about training: the frontier with the threshold, calibration, the training curve."""

from __future__ import annotations

from collections.abc import Sequence

from metis_agent.hdpo.evaluation import Estimate
from metis_agent.hdpo.report.charts import Axis, Mark, Series, chart, legend
from metis_agent.hdpo.report.estimates import wilson
from metis_agent.hdpo.report.facts import Facts
from metis_agent.hdpo.report.figures import agent_of
from metis_agent.hdpo.report.inputs import CURVES, AtThreshold, Gate, GateFigures
from metis_agent.hdpo.report.sections import table
from metis_agent.hdpo.report.words import html, share

__all__ = ["calibration", "frontier", "training"]

_UNMEASURED = (
    '<p class="none">Not measured. Give <code>--evaluation FILE</code>, written by '
    "<code>metis evaluate gate --json</code>"
)
_NO_HISTORY = (
    '<p class="none">Not given: <code>--history FILE</code>, such as <code>metrics.json</code> of '
    "<code>metis demo</code>.</p>"
)


def frontier(facts: Facts) -> str:
    """Accuracy against tool use: the gate's frontier with its threshold, or where the measured agents stand."""
    gate = facts.gate
    if gate is not None and gate.figures is not None:
        return _gate_frontier(gate, gate.figures)
    series = _agents(facts)
    if len(series) < 2:
        return f"{_UNMEASURED}.</p>"
    rows = [[html(one.name), share(one.marks[0].at[0]), share(one.marks[0].at[1])] for one in series]
    note = "" if gate is None else f"<p>The gate <code>{html(gate.name)}</code> {_threshold(gate)}</p>"
    return note + _figure("Accuracy and tool use of the agents measured", series, rows, ["", "Tool rate", "Accuracy"])


def _threshold(gate: Gate) -> str:
    at = "has no threshold" if gate.threshold is None else f"calls a tool above {gate.threshold:.3f}"
    return f"{at} (chosen so: {html(gate.chosen, 500)})." if gate.chosen else f"{at}."


def _gate_frontier(gate: Gate, figures: GateFigures) -> str:
    at = figures.at_threshold
    line = [(point.tool_rate, point.accuracy) for point in sorted(figures.frontier, key=lambda point: point.tool_rate)]
    series = [Series(name="the gate at every threshold", tone=0, line=line)]
    series.append(Series(name=f"at its threshold, {at.threshold:.3f}", tone=2, marks=[_threshold_mark(at)]))
    flat = {name: row.get("accuracy") for name, row in figures.baselines.items()}
    ends = [Mark(at=(rate, float(value))) for rate, name in ((0.0, "never"), (1.0, "always"))
            if isinstance(value := flat.get(name), int | float)]  # fmt: skip
    if ends:
        series.append(Series(name="never and always calling", tone=1, line=[m.at for m in ends], marks=ends))
    rows = [["At the threshold", share(at.tool_rate), share(at.accuracy)]]
    rows += [[html(name), "", share(float(value))] for name, value in flat.items() if isinstance(value, int | float)]
    rows += [["Frontier", share(x), share(y)] for x, y in line]
    return (
        f"<p>The gate <code>{html(gate.name)}</code> {_threshold(gate)}</p>"
        f"<p>{_at_threshold(at)} Measured on {html(gate.measured)}.</p>"
        + _figure("Accuracy of the gate at every tool rate", series, rows, ["", "Tool rate", "Accuracy"])
    )


def _threshold_mark(at: AtThreshold) -> Mark:
    def pair(interval: tuple[float | None, float | None] | None) -> tuple[float, float] | None:
        if interval is None or interval[0] is None or interval[1] is None:
            return None
        return interval[0], interval[1]

    return Mark(at=(at.tool_rate, at.accuracy), across=pair(at.tool_rate_interval), along=pair(at.accuracy_interval))


def _at_threshold(at: AtThreshold) -> str:
    known = {name: at.share(name) for name in ("redundant", "harmful", "necessary", "missed")}
    said = [f"{name} {share(value)}" for name, value in known.items() if value is not None]
    parts = f" Of all questions: {', '.join(said)}." if said else ""
    return (
        f"There it calls a tool on {share(at.tool_rate)} of the questions and is right on {share(at.accuracy)}.{parts}"
    )


def _agents(facts: Facts) -> list[Series]:
    """Where each agent and each forced branch stands."""
    after = facts.after
    found = [("after", 0, after.agent), ("before", 1, facts.before.agent if facts.before else None)]
    found += [("always calling (forced)", 3, agent_of(after.table, "tool")),
              ("never calling (forced)", 4, agent_of(after.table, "direct"))]  # fmt: skip
    series = []
    for name, tone, agent in found:
        if agent is None:
            continue
        rate, right = agent.estimate("tool_rate"), agent.estimate("accuracy")
        if rate.value is not None and right.value is not None:
            mark = Mark(at=(rate.value, right.value), across=_edges(rate), along=_edges(right))
            series.append(Series(name=name, tone=tone, marks=[mark]))
    return series


def _edges(estimate: Estimate) -> tuple[float, float] | None:
    return None if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)


def _figure(title: str, series: Sequence[Series], rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    heights = [y for one in series for _, y in one.line]
    heights += [y for one in series for mark in one.marks for y in (mark.at[1], *(mark.along or ()))]
    low, high = min(heights), max(heights)
    room = max(0.04, 0.08 * (high - low))
    y = Axis(label="accuracy", low=max(0.0, low - room), high=min(1.0, high + room))
    x = Axis(label="questions on which a tool is called")
    return _drawn(title, "Accuracy (upwards)", chart(title, x, y, series), series, table(title, head, rows))


def _drawn(title: str, said: str, svg: str, series: Sequence[Series], figures: str) -> str:
    return (
        f"<figure><figcaption>{said}</figcaption>{svg}{legend(series)}</figure>"
        f"<details><summary>Figures as a table</summary>{figures}</details>"
    )


def calibration(facts: Facts) -> str:
    """Of the questions to which the gate gave a probability, how many were right."""
    figures = facts.gate.figures if facts.gate else None
    if figures is None or not figures.calibration:
        return (
            _UNMEASURED
            + (" of this version: the one given has no calibration in it" if figures else "") + ".</p>"
        )  # fmt: skip
    marks = [
        Mark(at=(one.predicted, one.observed), along=wilson(one.observed, one.questions)) for one in figures.calibration
    ]
    title = "Calibration: predicted and observed share of right direct answers"
    series = [
        Series(name="perfect calibration", tone=9, line=[(0.0, 0.0), (1.0, 1.0)]),
        Series(name="questions in ten equal bins, with 95% intervals", tone=0, marks=marks),
    ]
    rows = [[f"{one.predicted:.3f}", f"{one.observed:.3f}", f"{one.questions:,.0f}"] for one in figures.calibration]
    quality = [f"{name} {value:.3f}" for name, value in (("Expected calibration error", figures.ece),
               ("Brier score", figures.brier), ("AUC", figures.auc)) if value is not None]  # fmt: skip
    x = Axis(label="probability that the direct answer is right, as the gate says")
    return f"<p>{', '.join(quality)}.</p>" + _drawn(
        title, "Direct answers that were right (upwards)", chart(title, x, Axis(label="right"), series), series,
        table(title, ["Predicted", "Observed", "Questions"], rows),
    )  # fmt: skip


def training(facts: Facts) -> str:
    """The training curve: what became of accuracy and of calls, step by step."""
    if facts.history is None:
        return _NO_HISTORY
    tones = dict(zip(CURVES, (0, 1, 5, 6, 7), strict=True))
    series = [
        Series(name=said, tone=tones[name], line=[(e["step"], e[name]) for e in facts.history if name in e])
        for name, said in CURVES.items()
        if any(name in entry for entry in facts.history)
    ]
    steps = [entry["step"] for entry in facts.history]
    first, last = min(steps), max(steps)
    x = Axis(label="training step", low=first, high=max(last, first + 1), word=lambda step: f"{step:.0f}")
    title = f"Training curve, steps {first:.0f} to {last:.0f}"
    shown = facts.history if len(facts.history) <= 100 else facts.history[:: len(facts.history) // 100 + 1]
    rows = [[f"{e['step']:.0f}", *(f"{e[name]:.3f}" if name in e else "–" for name in CURVES)] for e in shown]
    return _drawn(
        title, "Share of the step's free rollouts (rho: of all)", chart(title, x, Axis(label="share"), series), series,
        table(title, ["Step", *CURVES.values()], rows),
    )  # fmt: skip
