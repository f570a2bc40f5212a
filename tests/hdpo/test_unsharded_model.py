"""A second copy to sample from: it follows the trained weights, and must be of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from metis_agent.errors import ConfigurationError

from .policy_world import cold_start, furthest, rollouts_of, trainer_of


def test_rollouts_are_sampled_from_a_copy_that_follows_the_training(tmp_path: Path) -> None:
    model, sampler, shared = cold_start(), cold_start(), cold_start()
    apart = trainer_of(tmp_path, model=model, sampler=sampler, rollouts=rollouts_of(sampler, tmp_path / "apart"))
    apart.train()
    trainer_of(tmp_path, model=shared, rollouts=rollouts_of(shared, tmp_path / "shared")).train()
    assert furthest(model, shared) == 0.0
    # It made the rollouts of the second step, so it has what the first one learnt.
    assert furthest(sampler, cold_start()) > 0.0


def test_a_copy_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, intermediate_size=32))
    with pytest.raises(ConfigurationError, match="same checkpoint"):
        trainer_of(tmp_path, sampler=other)
