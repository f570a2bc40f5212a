"""Charts: points stand where they should, and nothing that is put in becomes markup."""

import re
from xml.etree import ElementTree

import pytest

from metis_agent.evaluation.agents import Estimate
from metis_agent.report.charts import Axis, Mark, Series, chart, legend, range_chart


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.52, 1.0, [0.6, 0.7, 0.8, 0.9, 1.0]),
        (1.0, 60.0, [10.0, 20.0, 30.0, 40.0, 50.0, 60.0]),
        (0.9, 0.91, [0.9, 0.902, 0.904, 0.906, 0.908, 0.91]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(label="x", low=low, high=high).ticks == pytest.approx(ticks)


def test_a_chart_is_well_formed_and_points_keep_their_places() -> None:
    series = [
        Series(name="a < b", tone=0, line=[(0.0, 0.0), (0.5, 1.0), (1.0, 0.5)]),
        Series(name="c", tone=2, marks=[Mark(at=(0.5, 0.5), across=(0.4, 0.6), along=(0.2, 0.8))]),
    ]
    axis = Axis(label="share")
    tree = ElementTree.fromstring(chart('A "title" & <more>', axis, axis, series))
    assert tree.attrib["role"] == "img"
    assert tree.attrib["aria-label"] == 'A "title" & <more>'
    # The plot is 394 wide from 52, and 244 high from 12 to 256.
    corners = [tuple(map(float, pair.split(","))) for pair in tree.find(".//polyline").attrib["points"].split()]  # type: ignore[union-attr]
    assert corners == [(52.0, 256.0), (249.0, 12.0), (446.0, 134.0)]
    whiskers = [line.attrib for line in tree.iter("line") if line.attrib["class"] == "whisker"]
    assert (whiskers[0]["x1"], whiskers[0]["x2"], whiskers[1]["y1"], whiskers[1]["y2"]) == (
        "209.6", "288.4", "207.2", "60.8"
    )  # fmt: skip
    assert "a &lt; b" in legend(series)


def test_points_outside_stay_inside_the_frame() -> None:
    drawn = chart("t", Axis(label="x"), Axis(label="y"), [Series(name="s", tone=0, line=[(-5.0, 9.0), (5.0, -9.0)])])
    assert 'points="52.0,12.0 446.0,256.0"' in drawn


def test_a_range_says_its_numbers() -> None:
    before = Estimate(value=0.5, low=0.4, high=0.6, questions=9)
    nothing = Estimate(value=None, low=None, high=None, questions=0)
    drawn = range_chart("Right", before, Estimate(value=0.25, low=0.0, high=1.0, questions=9))
    assert 'aria-label="Right: before 50.0%, after 25.0%"' in drawn
    assert re.findall(r'cx="([\d.]+)"', drawn) == ["110.0", "59.0"]
    ElementTree.fromstring(drawn)
    assert 'aria-label="Right: not known"' in range_chart("Right", None, nothing)
