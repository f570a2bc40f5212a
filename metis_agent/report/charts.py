"""Small charts as SVG, drawn here: the page loads nothing, and shows them without a script.

Tones are classes that the style sheet colours, for light and for dark; they are told apart by shape and dash too, so
a chart can be read without colours. The text alternative of a chart is its `title`, and the table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from metis_agent.evaluation.agents import Estimate
from metis_agent.report.document import visible

__all__ = ["Axis", "Mark", "Series", "chart", "legend", "percent", "range_chart"]

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 44

Point = tuple[float, float]


def percent(value: float) -> str:
    """A share as a tick says it."""
    return f"{100 * value:.0f}%"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From where to where, and in what words."""

    label: str
    low: float = 0.0
    high: float = 1.0
    word: Callable[[float], str] = percent

    @property
    def ticks(self) -> list[float]:
        """Round numbers, four to seven of them."""
        raw = max(self.high - self.low, 1e-9) / 5
        power = 10 ** math.floor(math.log10(raw))
        step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - raw))
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * (first + index), 10) for index in range(int((self.high - step * first) / step + 1e-9) + 1)]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point with its intervals."""

    at: Point
    across: tuple[float, float] | None = None
    """Interval of x."""
    along: tuple[float, float] | None = None
    """Interval of y."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one thing, joined or not."""

    name: str
    tone: int
    """From 0; 9 is a quiet line of reference."""
    line: Sequence[Point] = ()
    marks: Sequence[Mark] = ()


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """A figure with axes; drawn in the order given."""

    def place(point: Point) -> tuple[float, float]:
        right = (point[0] - x.low) / (x.high - x.low)
        up = (point[1] - y.low) / (y.high - y.low)
        inside = (min(max(right, 0.0), 1.0), min(max(up, 0.0), 1.0))
        return (
            round(_LEFT + inside[0] * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - inside[1] * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    drawn = [_axes(x, y, place)]
    for one in series:
        drawn.append(f'<g class="tone{one.tone}">')
        if one.line:
            corners = " ".join(f"{a},{b}" for a, b in map(place, one.line))
            drawn.append(f'<polyline class="line" points="{corners}"/>')
        for mark in one.marks:
            drawn.append(_mark(mark, place, one.tone))
        drawn.append("</g>")
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(visible(title))}">'
        f"{''.join(drawn)}</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """What is what; the same shapes as in the chart."""
    entries = []
    for one in series:
        line = '<polyline class="line" points="1,8 27,8"/>' if one.line else ""
        dot = _shape(14, 8, one.tone) if one.marks else ""
        entries.append(
            f'<li><svg class="key tone{one.tone}" viewBox="0 0 28 16" aria-hidden="true">{line}{dot}</svg>'
            f"{escape(visible(one.name))}</li>"
        )
    return f'<ul class="legend">{"".join(entries)}</ul>'


def range_chart(name: str, before: Estimate | None, after: Estimate) -> str:
    """One share before (above, hollow) and after (below, full) on a line from 0 to 100%, each with its interval."""
    words, rows = [], []
    for tone, said, estimate, y in ((1, "before", before, 10), (0, "after", after, 24)):
        if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
            continue
        words.append(f"{said} {100 * estimate.value:.1f}%")
        a, b, at = (round(8 + 204 * edge, 1) for edge in (estimate.low, estimate.high, estimate.value))
        whisker = f'<line class="whisker" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>'
        rows.append(f'<g class="tone{tone}">{whisker}{_shape(at, y, tone)}</g>')
    label = escape(f"{name}: {', '.join(words) or 'not known'}")
    grid = "".join(f'<line class="grid" x1="{8 + 51 * k}" x2="{8 + 51 * k}" y1="2" y2="32"/>' for k in range(5))
    return f'<svg class="range" viewBox="0 0 220 34" role="img" aria-label="{label}">{grid}{"".join(rows)}</svg>'


def _axes(x: Axis, y: Axis, place: Callable[[Point], tuple[float, float]]) -> str:
    drawn = []
    for tick in y.ticks:
        left, at = place((x.low, tick))
        drawn.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        drawn.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{escape(y.word(tick))}</text>')
    for tick in x.ticks:
        at, bottom = place((tick, y.low))
        drawn.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{escape(x.word(tick))}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    drawn.append(f'<text class="label" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    drawn.append(
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM}"/>'
    )
    return f'<g class="axes" aria-hidden="true">{"".join(drawn)}</g>'


def _mark(mark: Mark, place: Callable[[Point], tuple[float, float]], tone: int) -> str:
    x, y = place(mark.at)
    drawn = []
    if mark.across:
        a, b = (place((edge, mark.at[1]))[0] for edge in mark.across)
        drawn.append(f'<line class="whisker" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>')
    if mark.along:
        a, b = (place((mark.at[0], edge))[1] for edge in mark.along)
        drawn.append(f'<line class="whisker" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>')
    return "".join(drawn) + _shape(x, y, tone)


def _shape(x: float, y: float, tone: int) -> str:
    """A full dot, a hollow one, a diamond, a square: by tone."""
    if tone == 1:
        return f'<circle class="hollow" cx="{x}" cy="{y}" r="4.5"/>'
    if tone == 2:
        return f'<path class="dot" d="M{x} {y - 6}l6 6l-6 6l-6-6z"/>'
    if tone == 3:
        return f'<rect class="dot" x="{x - 4.5}" y="{y - 4.5}" width="9" height="9"/>'
    if tone == 4:
        return f'<path class="dot" d="M{x} {y - 5.5}l5.5 10h-11z"/>'
    return f'<circle class="dot" cx="{x}" cy="{y}" r="4.5"/>'
