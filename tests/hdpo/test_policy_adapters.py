"""LoRA trains adapters only and resumes exactly; activation checkpointing changes memory, not the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from metis_agent.hdpo.config import last_checkpoint

from .policy_world import STRATIFIED, arguments, cold_start, furthest, rollouts_of, trainer_of

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trained(folder: Path, *, stop: int | None = None, **changed: Any) -> Any:
    """Four updates with adapters; with `stop`, as if killed after so many and started again."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "optim": "adamw_torch", **changed}
    for last in [stop, 4] if stop else [4]:
        model = cold_start()
        torch.manual_seed(0)
        trainer = trainer_of(
            folder, arguments(folder, STRATIFIED, **settings), model=model,
            rollouts=rollouts_of(model, folder), peft_config=LORA,
        )  # fmt: skip
        if last == stop:
            trainer.add_callback(_stop_after(stop))
        found = last_checkpoint(folder)
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    return trainer


def _stop_after(step: int | None) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= (step or 0)

    return Stop()


def test_only_adapters_change_and_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    whole, resumed = trained(tmp_path / "whole"), trained(tmp_path / "resumed", stop=2)
    assert resumed.state.global_step == 4
    weights = {name: p.detach() for name, p in whole.model.named_parameters()}
    adapters = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert any(float(weights[name].abs().max()) > 0 for name in adapters if "lora_B" in name)  # it did learn
    base = dict(cold_start().named_parameters())
    for name, p in weights.items():
        if "lora_" not in name:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            torch.testing.assert_close(p, base[plain], rtol=0, atol=0)
    assert furthest(whole.model, resumed.model) < 1e-6


def test_activation_checkpointing_gives_the_same_update(tmp_path: Path) -> None:
    models = []
    for on in (False, True):
        model = cold_start()
        folder = tmp_path / str(on)
        trainer = trainer_of(
            folder, arguments(folder, STRATIFIED, max_steps=1, activation_checkpointing=on), model=model,
            rollouts=rollouts_of(model, folder),
        )  # fmt: skip
        trainer.train()
        assert model.is_activation_checkpointing is on
        models.append(model)
    assert furthest(models[0], cold_start()) > 1e-4
    assert furthest(*models) < 1e-5
