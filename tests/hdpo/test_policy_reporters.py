"""What a run writes to TensorBoard, read back from its event files."""

import math
from pathlib import Path

import pytest

from .policy_world import STRATIFIED, arguments, trainer_of

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXPECTED = (
    "hdpo/acc_loss", "hdpo/tool_loss", "hdpo/rho", "hdpo/tool_rate", "hdpo/tool_clip_fraction", "hdpo/excluded",
    "hdpo/accuracy", "hdpo/skipped_updates", "clip_ratio/region_mean",
)  # fmt: skip


def test_both_channels_and_what_was_left_out_are_in_the_event_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = trainer_of(tmp_path, arguments(tmp_path, STRATIFIED, report_to=["tensorboard"]))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    scalars = {tag.removeprefix("train/"): events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert set(EXPECTED) <= set(scalars), sorted(scalars)
    for name in EXPECTED:
        logged = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        assert [step for step, _ in logged] == [1, 2]
        assert [point.step for point in scalars[name]] == [1, 2]
        assert [point.value for point in scalars[name]] == pytest.approx([value for _, value in logged], rel=1e-5)
        assert all(math.isfinite(point.value) for point in scalars[name])
