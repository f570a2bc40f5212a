"""One training run in a world: a cold start, an objective, HDPO's steps, and a measured policy.

What `metis demo` shows once and `benchmarks/hdpo.py` repeats over objectives and seeds. A world says what is asked,
by which agent, and which weights are trained. Everything under the run's folder is written as it happens, so a run that
was killed goes on where it stopped.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from metis_agent.agent import MetisAgent
from metis_agent.evaluation.agents import Measurement, Probes, measure
from metis_agent.gates.base import Gate
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.config import last_checkpoint
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.models.local import LocalChatModel
from metis_agent.models.vision import ImageReader
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts
from metis_agent.types import Question, Trajectory

__all__ = ["History", "WorldExperiment"]

History = list[Mapping[str, float]]
"""One mapping of metrics a training step, each with its `step`."""


@dataclass(frozen=True, kw_only=True)
class WorldExperiment(ABC):
    """The settings of a run; two runs with the same settings give the same numbers."""

    reply: ClassVar[int]
    """Tokens that a reply may have."""
    concurrency: ClassVar[int] = 256
    """Runs of the graph in flight at once."""
    classes: ClassVar[Mapping[str, Collection[str]]] = {}
    """Kinds of questions that are measured together, by name."""

    folder: Path
    cold_start: Path
    objective: Objective = Objective()
    groups: StratifiedGroups = StratifiedGroups()
    steps: int = 60
    questions_per_step: int = 16
    learning_rate: float = 8e-4
    """Of AdamW; decays linearly to a tenth."""
    test_questions: int = 500
    temperature: float = 0.0
    """At which a policy is measured; it is trained, and probed for what it knows, at 1."""
    probes: Probes = Probes()
    checkpoint_every: int = 10
    """Steps; what a killed run loses at most (its finished rollouts are kept in any case)."""
    seed: int = 0

    @abstractmethod
    def agent(self, chat: LocalChatModel, gate: Gate | None = None) -> MetisAgent:
        """The agent of this world, around a gate."""

    @abstractmethod
    def questions(self, split: Literal["train", "test"], count: int) -> tuple[Question, ...]:
        """So many questions, the same for the same seed."""

    def trained(self, model: Any) -> Iterable[torch.nn.Parameter]:
        """The weights that training changes; the others are frozen."""
        return model.parameters()  # type: ignore[no-any-return]

    def close(self) -> None:  # noqa: B027 - most worlds hold nothing
        """Let go of what the tools hold."""

    @property
    def policy(self) -> Path:
        """Where the trained policy is saved."""
        return self.folder / "policy"

    def train(
        self,
        *,
        on_step: Callable[[Mapping[str, float]], None] = lambda _: None,
    ) -> History:
        """Train the cold start, or go on from the last checkpoint; the policy is left in `folder/policy`."""
        chat = LocalChatModel.load(self.cold_start, temperature=1.0, max_new_tokens=self.reply)
        lessons = self.questions("train", self.steps * self.questions_per_step)
        weights = list(self.trained(chat.model))
        chat.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=self.steps)
        trainer = HDPOTrainer(
            chat.model,
            chat.tokenizer,
            self._arguments(),
            questions=lessons,
            rollouts=self._rollouts(chat, "train"),
            objective=self.objective,
            groups=self.groups,
            images=ImageReader(chat.processor) if chat.processor else None,
            seed=self.seed,
            optimizers=(optimizer, schedule),
            callbacks=[_Steps(chat, on_step)],
        )
        trainer.remove_callback(PrinterCallback)
        # What stands now stays for the run; going through it again and again would take half of Python's time.
        gc.collect()
        gc.freeze()
        stopped = last_checkpoint(self._checkpoints)
        trainer.train(resume_from_checkpoint=str(stopped) if stopped else None)
        trainer.save_model(str(self.policy))
        (chat.processor or chat.tokenizer).save_pretrained(self.policy)
        return [entry for entry in trainer.state.log_history if "hdpo/rho" in entry]

    def measure(
        self, policy: Path, name: str, *, progress: Callable[[Trajectory], None] = lambda _: None
    ) -> Measurement:
        """Measure a policy's folder on held-out questions."""
        chat = LocalChatModel.load(policy, temperature=self.temperature, max_new_tokens=self.reply)
        sampled = LocalChatModel(
            model=chat.model, tokenizer=chat.tokenizer, processor=chat.processor, temperature=1.0,
            max_new_tokens=self.reply,
        )  # fmt: skip
        return measure(
            self._rollouts(chat, name),
            self.questions("test", self.test_questions),
            name=name,
            seed=self.seed,
            probes=self.probes,
            probe_rollouts=self._rollouts(sampled, name),
            classes=self.classes,
            progress=progress,
        )

    def _rollouts(self, chat: LocalChatModel, name: str) -> Rollouts:
        store = TrajectoryStore(self.folder / "trajectories" / name)
        return Rollouts(lambda gate: self.agent(chat, gate), store, concurrency=self.concurrency)

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
