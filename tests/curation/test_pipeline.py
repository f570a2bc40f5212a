"""The pipeline: nothing lost, nothing twice, after kill -9 as well; settings that changed are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metis_agent.curation.pipeline import KEEP, Chunking, CurationReport, Row, Verdict, drop, keep, undecided
from metis_agent.curation.sft import MARK, UniqueStage, curate_sft
from metis_agent.errors import ConfigurationError, InfrastructureError, StorageError
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Trajectory

from .runs import run

ROWS = 300
SLOW = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.curation.test_pipeline import curate
curate(Path(sys.argv[1]), pause=0.02)
"""


class ByNumber:
    """Drops every third row and sets every tenth aside; takes its time where asked to."""

    name = "by number"

    def __init__(self, *, modulus: int = 3, pause: float = 0.0) -> None:
        self.settings: dict[str, Any] = {"modulus": modulus}
        self._modulus, self._pause = modulus, pause

    def rule(self, rows: Sequence[Row[Trajectory]]) -> list[Verdict]:
        time.sleep(self._pause)
        return [self._of(int(row.value.id.split("/")[1])) for row in rows]

    def _of(self, number: int) -> Verdict:
        if number % self._modulus == 0:
            return drop("every third", number)
        return undecided("every tenth", number) if number % 10 == 0 else keep("even") if number % 2 == 0 else KEEP


def store(folder: Path, rows: int = ROWS) -> Path:
    """Rows with a duplicate id every 50."""
    with TrajectoryStore(folder / "store", shard_bytes=20_000) as written:
        for number in range(rows):
            written.append(run(id=f"run/{number - 1 if number % 50 == 49 else number}"))
    return folder / "store"


def curate(folder: Path, *, pause: float = 0.0, modulus: int = 3, rows: int = 7, **options: Any) -> CurationReport:
    stages = [UniqueStage(folder / "ids"), ByNumber(modulus=modulus, pause=pause)]
    return curate_sft(folder / "store", folder / "out", stages, chunking=Chunking(rows=rows), **options)


def outcome(folder: Path) -> dict[str, list[Trajectory]]:
    places = ("kept", "quarantine/dropped", "quarantine/undecided")
    return {place: list(TrajectoryStore(folder / "out" / place, read_only=True).read()) for place in places}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurationReport, dict[str, list[Trajectory]]]:
    folder = tmp_path_factory.mktemp("whole")
    store(folder)
    return curate(folder), outcome(folder)


def test_in_is_kept_and_quarantined(uninterrupted: tuple[CurationReport, dict[str, list[Trajectory]]]) -> None:
    report, written = uninterrupted
    # 300 rows, 6 duplicates; of the other 294 the numbers 0, 3, ... go, then the tens that are left.
    left = [number for number in range(ROWS) if number % 50 != 49]
    thirds = [number for number in left if number % 3 == 0]
    tens = [number for number in left if number % 3 and number % 10 == 0]
    assert report.rows == ROWS == sum(map(len, written.values()))
    assert report.to_dict()["stages"][0]["dropped"] == {"duplicate id": 6}
    assert report.to_dict()["stages"][1]["dropped"] == {"every third": len(thirds)}
    assert report.to_dict()["stages"][1]["undecided"] == {"every tenth": len(tens)}
    assert len(written["kept"]) == report.kept.total() == 294 - len(thirds) - len(tens)
    assert all(
        stage.rows_in == stage.rows_out + stage.dropped.total() + stage.undecided.total() for stage in report.stages
    )


def test_quarantine_says_where_and_why(uninterrupted: tuple[CurationReport, dict[str, list[Trajectory]]]) -> None:
    written = uninterrupted[1]
    assert {trajectory.metadata[MARK]["stage"] for trajectory in written["quarantine/dropped"]} == {
        "unique",
        "by number",
    }
    first = written["quarantine/undecided"][0]
    assert first.metadata[MARK] == {"stage": "by number", "reason": "every tenth", "detail": "10"}
    assert all(MARK not in trajectory.metadata for trajectory in written["kept"])


def test_killed_again_and_again_it_ends_in_the_same_files(
    tmp_path: Path, uninterrupted: tuple[CurationReport, dict[str, list[Trajectory]]]
) -> None:
    store(tmp_path)
    # The clock in the names of its segments is all that differs between the two sources.
    kills = 0
    for after in (2, 15):
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)])
        until = time.monotonic() + 120
        while _chunks(tmp_path) < after and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    # What a kill in the middle of a chunk leaves: rows of a chunk that has no report.
    (tmp_path / "out/kept" / f"segment-{_chunks(tmp_path):08d}.jsonl").write_text("left over")
    report = curate(tmp_path)
    assert report.to_dict() == uninterrupted[0].to_dict()
    assert outcome(tmp_path) == uninterrupted[1]


def _chunks(folder: Path) -> int:
    return len(list((folder / "out/progress").glob("chunk-*.json")))


def test_run_again_when_finished_it_only_reports(tmp_path: Path) -> None:
    store(tmp_path, 20)
    first = curate(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/kept").iterdir()}
    assert curate(tmp_path).to_dict() == first.to_dict()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/kept").iterdir()} == before
    assert json.loads((tmp_path / "out/report.json").read_text())["rows"] == 20


def test_other_settings_or_another_source_are_refused_and_fresh_starts_again(tmp_path: Path) -> None:
    store(tmp_path, 20)
    curate(tmp_path)
    with pytest.raises(ConfigurationError, match=r"by number\.modulus was 3, now 4.*--fresh"):
        curate(tmp_path, modulus=4)
    with TrajectoryStore(tmp_path / "store") as grown:
        grown.append(run(id="run/20"))
    with pytest.raises(ConfigurationError, match="source was"):
        curate(tmp_path)
    assert curate(tmp_path, fresh=True).rows == 21
    assert sum(map(len, outcome(tmp_path).values())) == 21


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path: Path) -> None:
    store(tmp_path, 3)
    (tmp_path / "out/kept").mkdir(parents=True)
    (tmp_path / "out/kept/precious.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigurationError, match="holds other files"):
            curate(tmp_path, fresh=fresh)
    assert (tmp_path / "out/kept/precious.txt").read_text() == "mine"
    with pytest.raises(ConfigurationError, match="are both"):
        curate_sft(tmp_path / "store", tmp_path / "store", [])


def test_a_stage_that_decides_nothing_stops_the_run_and_writes_nothing(tmp_path: Path) -> None:
    class Down(ByNumber):
        down = True

        def _of(self, number: int) -> Verdict:
            return undecided("judge unavailable", "no route") if self.down else KEEP

    store(tmp_path, 60)
    stage = Down()
    stages = [stage]
    with pytest.raises(InfrastructureError, match=r"none of 30 rows: judge unavailable \(no route\)"):
        curate_sft(tmp_path / "store", tmp_path / "out", stages, chunking=Chunking(rows=30))
    assert _chunks(tmp_path) == 0
    stage.down = False
    report = curate_sft(tmp_path / "store", tmp_path / "out", stages, chunking=Chunking(rows=30))
    assert (report.rows, report.kept.total()) == (60, 60)


def test_what_was_set_aside_can_be_curated_again(tmp_path: Path) -> None:
    store(tmp_path, 40)
    curate(tmp_path)
    again = curate_sft(tmp_path / "out/quarantine/undecided", tmp_path / "again", [])
    kept = list(TrajectoryStore(tmp_path / "again/kept", read_only=True).read())
    assert again.kept == Counter(kept=2)
    assert [trajectory.id for trajectory in kept] == ["run/10", "run/20"]
    assert all(MARK not in trajectory.metadata for trajectory in kept)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from metis_agent.recording.shards import Storage

    store(tmp_path, 40)
    put, puts = Storage.put, []

    def full(self: Storage, name: str, content: bytes) -> None:
        puts.append(name)
        if len(puts) == 9:
            raise StorageError("no space left on device")
        put(self, name, content)

    monkeypatch.setattr(Storage, "put", full)
    with pytest.raises(StorageError, match="no space"):
        curate(tmp_path)
    assert curate(tmp_path).rows == 40 == sum(map(len, outcome(tmp_path).values()))


def test_a_chunk_ends_at_its_bytes(tmp_path: Path) -> None:
    with TrajectoryStore(tmp_path / "store") as written:
        for number in range(10):
            written.append(replace(run(id=f"run/{number}"), metadata={"big": "x" * 10_000}))
    curate_sft(tmp_path / "store", tmp_path / "out", [], chunking=Chunking(rows=1_000, bytes=25_000))
    assert _chunks(tmp_path) == 4


def test_the_outcome_may_be_on_another_file_system(tmp_path: Path) -> None:
    store(tmp_path, 20)
    url = f"memory://curated-{os.getpid()}"
    report = curate_sft(tmp_path / "store", url, [ByNumber()], chunking=Chunking(rows=6))
    kept = list(TrajectoryStore(f"{url}/kept", read_only=True).read())
    assert len(kept) == report.kept.total() > 0
