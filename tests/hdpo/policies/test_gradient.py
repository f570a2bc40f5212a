"""The training loop: early stopping by whole groups, and a killed fit that ends as one that was not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.policies.gradient import fit_heads, fit_name, load_state, logits_of
from metis_agent.hdpo.settings import GradientTraining


class Killed(Exception):
    """In place of a crash."""


class Linear:
    """Two heads over given numbers, with dropout, so that the order of random numbers counts."""

    def __init__(self, x: np.ndarray) -> None:
        torch.manual_seed(0)
        self._x = torch.tensor(x, dtype=torch.float32)
        self.module: torch.nn.Module = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(x.shape[1], 2))
        self.seen: list[list[int]] = []

    def logits(self, rows: Sequence[int], epoch: int | None) -> torch.Tensor:
        if epoch is not None:
            self.seen.append(list(rows))
        out: torch.Tensor = self.module(self._x[list(rows)])
        return out


RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
TARGETS = (RNG.random((60, 2)) < 1 / (1 + np.exp(-3 * X[:, :2]))).astype(float)
ROWS = np.arange(60)
GROUPS = [str(row // 3) for row in ROWS]


def fit(training: GradientTraining, progress: object = None) -> Linear:
    heads = Linear(X)
    report = progress or (lambda stage, done, total: None)
    fit_heads(heads, ROWS, TARGETS, GROUPS, training, name="fit", progress=report)  # type: ignore[arg-type]
    return heads


def test_a_killed_fit_ends_as_one_that_was_not(tmp_path: Path) -> None:
    training = GradientTraining(epochs=6, learning_rate=0.05, patience=9, batch_size=8)
    whole = logits_of(fit(training), ROWS.tolist(), 8)

    def kill(stage: str, done: int, total: int) -> None:
        if stage.startswith("epoch 4"):
            raise Killed

    resumed = GradientTraining(epochs=6, learning_rate=0.05, patience=9, batch_size=8, resume=tmp_path)
    with pytest.raises(Killed):
        fit(resumed, kill)
    again = fit(resumed)
    np.testing.assert_array_equal(logits_of(again, ROWS.tolist(), 8), whole)
    # Three of six epochs were left to do, and none the next time.
    per_epoch = -(-51 // 8)
    assert len(again.seen) == 3 * per_epoch
    once_more = fit(resumed)
    assert not once_more.seen
    np.testing.assert_array_equal(logits_of(once_more, ROWS.tolist(), 8), whole)


def test_a_damaged_state_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "fit.safetensors").write_bytes(b"half of one")
    assert load_state(tmp_path / "fit.safetensors") is None
    assert fit(GradientTraining(epochs=1, resume=tmp_path)).seen


def test_groups_are_held_out_whole() -> None:
    heads = fit(GradientTraining(epochs=1, held_out=0.2))
    left_out = set(ROWS.tolist()) - {row for batch in heads.seen for row in batch}
    assert len(left_out) == 12  # a fifth of 20 groups of 3
    assert all(len([row for row in left_out if row // 3 == group]) == 3 for group in {row // 3 for row in left_out})


def test_it_stops_when_the_held_out_loss_does_not_fall_and_keeps_the_best() -> None:
    # A rate that makes things worse at once: the untrained state is the best, and comes back.
    heads = fit(GradientTraining(epochs=50, learning_rate=30.0, patience=2, warmup=0.0, clip=1e9))
    np.testing.assert_array_equal(logits_of(heads, [0, 1], 2), logits_of(Linear(X), [0, 1], 2))
    assert len(heads.seen) == 2 * -(-51 // 16)


def test_the_name_of_a_fit_follows_its_rows_model_and_outcomes() -> None:
    keys = [str(row) for row in ROWS]
    names = {
        fit_name(["m", 1], keys, ROWS, TARGETS),
        fit_name(["m", 2], keys, ROWS, TARGETS),
        fit_name(["m", 1], keys, ROWS[::-1], TARGETS),
        fit_name(["m", 1], keys, ROWS, 1 - TARGETS),
    }
    assert len(names) == 4
    assert fit_name(["m", 1], keys, ROWS, TARGETS) in names


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"held_out": 1.0}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        GradientTraining(**wrong)  # type: ignore[arg-type]
