"""One training run in the almanac: a cold start, an objective, HDPO's steps, and a measured policy.

What `metis demo` shows once and `benchmarks/hdpo.py` repeats over objectives and seeds. Everything under the
run's folder is written as it happens, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.budget import Budget
from metis_agent.gates.base import Gate
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.measure import Measurement, Probes, measure
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.hdpo.rollouts import Rollouts
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Trajectory
from metis_agent.worlds.almanac.agent import COLD_START
from metis_agent.worlds.almanac.noise import Noise
from metis_agent.worlds.almanac.questions import KINDS, Kind, questions
from metis_agent.worlds.almanac.tools import almanac_tools

__all__ = ["COLD_START", "Experiment", "History"]

_REPLY = 24
"""Tokens; the longest reply that is of use has 14."""

History = list[Mapping[str, float]]
"""One mapping of metrics a training step, each with its `step`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The settings of a run; two runs with the same settings give the same numbers."""

    folder: Path
    objective: Objective = Objective()
    groups: StratifiedGroups = StratifiedGroups()
    kinds: tuple[Kind, ...] = KINDS
    steps: int = 60
    questions_per_step: int = 16
    learning_rate: float = 8e-4
    """Of AdamW; decays linearly to a tenth."""
    test_questions: int = 500
    temperature: float = 0.0
    """At which a policy is measured; it is trained, and probed for what it knows, at 1."""
    probes: Probes = Probes()
    noise: Noise = Noise()
    checkpoint_every: int = 10
    """Steps; what a killed run loses at most (its finished rollouts are kept in any case)."""
    seed: int = 0
    cold_start: Path = COLD_START

    def train(
        self,
        *,
        on_step: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> History:
        """Train the cold start, or go on from the last checkpoint; the policy is left in `folder/policy`."""
        chat = LocalChatModel.load(self.cold_start, temperature=1.0, max_new_tokens=_REPLY)
        lessons = questions("train", self.steps * self.questions_per_step, seed=self.seed, kinds=self.kinds)
        optimizer = torch.optim.AdamW(chat.model.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.steps)
        trainer = HDPOTrainer(
            chat.model,
            chat.tokenizer,
            self._arguments(),
            questions=lessons,
            rollouts=self._rollouts(chat, "train"),
            objective=self.objective,
            groups=self.groups,
            seed=self.seed,
            optimizers=(optimizer, schedule),
            callbacks=[_Steps(chat, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        # What stands now stays for the run; going through it again and again would take half of Python's time.
        gc.collect()
        gc.freeze()
        trainer.train(resume_from_checkpoint=_last_checkpoint(self._checkpoints))
        trainer.save_model(str(self.policy))
        chat.tokenizer.save_pretrained(self.policy)
        return [entry for entry in trainer.state.log_history if "hdpo/rho" in entry]

    @property
    def policy(self) -> Path:
        """Where the trained policy is saved."""
        return self.folder / "policy"

    def measure(
        self, policy: Path, name: str, *, progress: Callable[[Trajectory], None] = lambda _: None
    ) -> Measurement:
        """Measure a policy's folder on held-out questions."""
        chat = LocalChatModel.load(policy, temperature=self.temperature, max_new_tokens=_REPLY)
        sampled = LocalChatModel(model=chat.model, tokenizer=chat.tokenizer, temperature=1.0, max_new_tokens=_REPLY)
        return measure(
            self._rollouts(chat, name),
            questions("test", self.test_questions, seed=self.seed, kinds=self.kinds),
            name=name,
            seed=self.seed,
            probes=self.probes,
            probe_rollouts=self._rollouts(sampled, name),
            progress=progress,
        )

    def agent(self, chat: LocalChatModel, gate: Gate | None = None) -> MetisAgent:
        """The agent of this world, around a gate."""
        # Short refusals and few calls: the tiny model reads little, and one long run pads a whole batch.
        return create_metis_agent(
            chat, almanac_tools(noise=self.noise), gate=gate, budget=Budget(calls=2), block_message="Error."
        )

    def _rollouts(self, chat: LocalChatModel, name: str) -> Rollouts:
        store = TrajectoryStore(self.folder / "trajectories" / name)
        return Rollouts(lambda gate: self.agent(chat, gate), store)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _arguments(self) -> GRPOConfig:
        rows = self.questions_per_step * self.groups.size
        return GRPOConfig(
            output_dir=str(self._checkpoints),
            num_generations=self.groups.size,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            max_steps=self.steps,
            num_train_epochs=1,
            max_completion_length=256,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            seed=self.seed,
            logging_steps=1,
            save_steps=self.checkpoint_every,
            save_total_limit=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            shuffle_dataset=False,
        )


class _Steps(TrainerCallback):
    """Stamps the rollouts with the weights that made them, and hands each step's metrics on."""

    def __init__(self, chat: LocalChatModel, on_step: Callable[[Mapping[str, float]], None]) -> None:
        self._chat, self._on_step = chat, on_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._chat.weights_version = f"step-{state.global_step}"

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs and "hdpo/rho" in logs:
            self._on_step({**logs, "step": state.global_step})


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; a kill may have left a torn one behind it."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / "trainer_state.json").exists()]
    return str(whole[-1]) if whole else None
