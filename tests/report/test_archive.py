"""Which runs the page carries, and that they come back as they were."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metis_agent.report.facts import ReportInputs, gather
from metis_agent.report.transcript import Archive, choose
from metis_agent.types import Question, Trajectory
from tests.report.stores import AFTER, BEFORE, run, store, table_of


def unpacked(block: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(block)))


def test_within_the_limit_all_are_carried() -> None:
    tables = [table_of(AFTER), table_of(BEFORE)]
    assert all(rows.all() for rows in choose(tables, len(AFTER) + len(BEFORE)))
    assert not any(rows.any() for rows in choose(tables, 0))


def test_rare_runs_come_whole_and_common_ones_share_the_rest() -> None:
    # 100 right direct answers, 60 wrong ones, 3 that failed: of 63, 3 + 30 + 30.
    right = [run(Question(id=f"r{n}", text="?", answer="1"), "1") for n in range(100)]
    wrong = [run(Question(id=f"w{n}", text="?", answer="1"), "2") for n in range(60)]
    failed = [Trajectory(id=f"f{n}", question=Question(id="x", text="?"), status="failed") for n in range(3)]
    table = table_of((*right, *wrong, *failed))
    (rows,) = choose([table], 63)
    assert [int(rows[a:b].sum()) for a, b in ((0, 100), (100, 160), (160, 163))] == [30, 30, 3]
    assert np.array_equal(rows, choose([table], 63)[0])


@pytest.mark.parametrize("count", [1, 199, 200, 201, 450])
def test_each_run_is_found_in_its_block(count: int, tmp_path: Path) -> None:
    runs = tuple(run(Question(id=f"q{n}", text=f"question {n}", answer="1", kind="k"), str(n)) for n in range(count))
    facts = gather(ReportInputs(store=store(tmp_path / "a", runs)))
    index = facts.archive.index()
    starts, found = index["starts"], [unpacked(block) for block in facts.archive.blocks]
    assert [len(block) for block in found] == [b - a for a, b in zip(starts, [*starts[1:], count], strict=True)]
    everything = [transcript for block in found for transcript in block]
    assert [transcript["question"] for transcript in everything] == [f"question {n}" for n in range(count)]
    assert index["columns"]["text"] == [f"question {n}" for n in range(count)]
    assert all(len(column) == count for column in index["columns"].values())


def test_labels_and_tools_of_the_index(tmp_path: Path) -> None:
    facts = gather(ReportInputs(store=store(tmp_path / "a", AFTER)))
    index = facts.archive.index()
    columns, bit = index["columns"], {name: 1 << place for place, name in enumerate(index["labels"])}
    row = next(n for n, each in enumerate(AFTER) if each.id == "free/q2/0")
    assert columns["labels"][row] & bit["redundant"]
    assert not columns["labels"][row] & bit["wrong"]
    assert [index["tools"][tool] for tool in columns["tools"][row]] == ["python"]
    missed = next(n for n, each in enumerate(AFTER) if each.id == "free/q3/0")
    assert columns["labels"][missed] == bit["missed"] | bit["wrong_direct"] | bit["wrong"]


def test_a_block_of_large_runs_is_closed_early() -> None:
    runs = tuple(run(Question(id=f"q{n}", text="long " * 4000, answer="1"), "word " * 20_000) for n in range(60))
    archive = Archive()
    archive.add(runs, table_of(runs), np.ones(60, dtype=bool), store="memory://none", number=0)
    archive.index()
    assert len(archive.blocks) > 1
