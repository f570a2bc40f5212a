"""The page as a file: whole, well formed, closed to the outside, and right in what it says."""

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from metis_agent.errors import StorageError
from metis_agent.report.facts import ReportInputs
from metis_agent.report.page import write_report
from tests.report.stores import AFTER, BEFORE, PROBES, hostile_runs, image_block, png, run, store
from tests.report.test_inputs import STEP

VOID = {"meta", "input", "br", "img", "link", "hr"}
SVG_SINGLE = {"circle", "path", "line", "polyline", "rect"}


class Reader(HTMLParser):
    """Checks nesting, and keeps what was met."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_SINGLE, f"<{tag}/> closes nothing in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        else:
            self.text.append(data)


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def words(reader: Reader) -> str:
    return " ".join(" ".join(reader.text).split())


@pytest.fixture
def full(tmp_path: Path) -> Path:
    (tmp_path / "history.json").write_text(json.dumps([STEP, {**STEP, "step": 5}]))
    inputs = ReportInputs(
        store=store(tmp_path / "after", AFTER), before=store(tmp_path / "before", BEFORE),
        history=tmp_path / "history.json",
    )  # fmt: skip
    write_report(inputs, tmp_path / "out" / "report.html", title="Mine & yours")
    return tmp_path / "out" / "report.html"


def closed(path: Path) -> Reader:
    """What holds of every page that we write."""
    reader = read(path)
    ids = Counter(attributes["id"] for _, attributes in reader.tags if attributes.get("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in reader.tags:
        assert tag not in {"iframe", "object", "embed", "link", "base", "a "}
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")]
        for name in ("href", "src"):
            if (target := attributes.get(name)) is not None:
                assert target.startswith("#")
                assert target[1:] in ids
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    running = [a for t, a in reader.tags if t == "script" and "type" not in a]
    assert len(running) == 1
    for kind in ("style", "script"):
        last = reader.raw[kind][-1]
        digest = base64.b64encode(hashlib.sha256(last.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    packed = reader.raw["script"][:-1]
    assert all(re.fullmatch(r"(data:image/(png|jpeg|gif|webp);base64,)?[A-Za-z0-9+/=]+", each) for each in packed)
    return reader


def test_the_page_says_what_was_worked_out_by_hand(full: Path) -> None:
    reader = closed(full)
    said = words(reader)
    assert "Mine & yours" in said
    assert "As many tool calls, as far as can be told on the same questions" in said
    assert "Tool calls −40% 1.00 → 0.60 a question" in said
    assert "400 calls saved per 1,000 questions" in said
    assert "Accuracy 0.0 pt 75.0% → 75.0%" in said
    assert "Redundant calls 100.0%" in said
    assert "This page carries all 37 runs." in said
    assert "1 failed run, 1 unjudged (no reference)" in said
    assert "Changes are of the 5 questions in both" in said


def test_the_summary_stands_before_the_runs(full: Path) -> None:
    text = full.read_text()
    assert text.index("Every decision") < text.index('id="index"') < text.index("data-block")


def test_the_same_store_gives_the_same_page(tmp_path: Path) -> None:
    url = store(tmp_path / "a", AFTER)
    for name in ("one.html", "two.html"):
        write_report(ReportInputs(store=url), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (AFTER, "compared with always calling a tool"),
        (PROBES, "This store holds forced runs only"),
        ((run("q5", "Yes."),), "no answers that could be judged"),
        ((run("q1", "4"), run("q2", "6")), "100.0% of answers right"),
    ],
)
def test_any_store_makes_a_page(runs: tuple[object, ...], said: str, tmp_path: Path) -> None:
    write_report(ReportInputs(store=store(tmp_path / "a", runs)), tmp_path / "x.html")  # type: ignore[arg-type]
    assert said in words(closed(tmp_path / "x.html"))


def test_a_sample_says_that_it_is_one(tmp_path: Path) -> None:
    write_report(ReportInputs(store=store(tmp_path / "a", AFTER), decisions=7), tmp_path / "x.html")
    assert f"This page carries 7 of {len(AFTER)} runs" in words(closed(tmp_path / "x.html"))


def test_hostile_records_stay_text(tmp_path: Path) -> None:
    runs = hostile_runs()
    url = store(tmp_path / 'it\'s "here" <b>', runs)
    write_report(ReportInputs(store=url, before=url), tmp_path / "x.html", title="</title><script>window.hacked=1")
    reader = closed(tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text()
    body = text[: text.index('id="index"')]
    assert "<script>window" not in body
    assert "<img" not in body
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<img src=x onerror=window.hacked=1>" in words(reader)  # as text, for its kind is one
    assert len(body) < 300_000


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    url = store(tmp_path / "a", AFTER)
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="can't be written"):
        write_report(ReportInputs(store=url), tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_pictures_are_in_the_page(tmp_path: Path) -> None:
    from dataclasses import replace

    picture = replace(run("q5", "Yes."), messages=({"type": "human", "data": {"content": [image_block(png())]}},))
    write_report(ReportInputs(store=store(tmp_path / "a", (picture,))), tmp_path / "x.html")
    reader = closed(tmp_path / "x.html")
    assert f"data:image/png;base64,{base64.b64encode(png()).decode()}" in reader.raw["script"]
