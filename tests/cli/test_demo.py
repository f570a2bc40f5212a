"""`metis demo` as somebody runs it: interrupted, refused with other settings, taken up again, finished."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metis_agent.recording.store import TrajectoryStore

NUMBERS = (
    "accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question", "seconds_per_question",
    "questions",
)  # fmt: skip


AT_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""A shell's job in the background passes on that Ctrl-C is ignored, to the tests and to what they start."""


def metis(*arguments: str) -> list[str]:
    return [sys.executable, "-c", f"{AT_A_TERMINAL}; from metis_agent.cli import main; main()", *arguments]


@pytest.mark.slow
def test_a_demo_that_was_interrupted_is_taken_up_and_finished(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = metis("demo", "--folder", str(folder), "--steps", "2", "--questions", "5")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    measured = folder / "trajectories" / "cold_start"
    until = time.monotonic() + 100
    while not any(path.stat().st_size for path in measured.glob("*.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert "Run the same command again" in errors
    assert not (folder / "metrics.json").exists()
    kept = set(TrajectoryStore(measured, read_only=True).ids())
    assert kept

    other = subprocess.run([*command[:-1], "20"], capture_output=True, text=True, timeout=100)
    assert other.returncode == 1
    assert "--fresh" in other.stderr

    again = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert again.returncode == 0, again.stderr
    assert "Going on" in again.stdout
    everything = list(TrajectoryStore(measured, read_only=True).read())
    assert len(everything) == len({trajectory.id for trajectory in everything}) == 30
    assert kept <= {trajectory.id for trajectory in everything}

    metrics = json.loads((folder / "metrics.json").read_text())
    for policy in ("cold_start", "hdpo"):
        assert set(NUMBERS) <= set(metrics[policy])
        assert metrics[policy]["questions"] == 5
    assert metrics["cold_start"]["redundant_rate"] == 1.0
    assert [entry["step"] for entry in metrics["history"]] == [1, 2]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Next: metis ask" in again.stdout

    # A finished run is not run again, and not deleted, unless somebody says so.
    written = (folder / "metrics.json").stat().st_mtime_ns
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (finished.returncode, (folder / "metrics.json").stat().st_mtime_ns) == (0, written)
    assert "--fresh" in finished.stdout
    assert "metis report --store" in finished.stdout


def test_help_teaches_the_first_step() -> None:
    shown = subprocess.run(metis("--help"), capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0
    assert "metis demo" in shown.stdout


def test_a_wrong_option_is_a_usage_error() -> None:
    shown = subprocess.run(metis("demo", "--steps", "0"), capture_output=True, text=True, timeout=60)
    assert shown.returncode == 2
    assert "--steps" in shown.stderr
