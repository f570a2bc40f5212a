"""The settings of policy training, checked before any work starts, and what its curves show.

`HDPOConfig` is TRL's `GRPOConfig` with what HDPO adds; `last_checkpoint` says where a stopped run goes on. `Validation`
says when and on what the agent is measured as it is deployed: freely, and by forced probes that tell what it knows (see
`measure`). `step_metrics` reads the scores that a step's advantages are made of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from trl import GRPOConfig

from metis_agent.errors import ConfigurationError
from metis_agent.evaluation.agents import Probes, evaluate, share_right
from metis_agent.hdpo.advantages import Channels, Objective
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.rewards import Scores
from metis_agent.judging.verifiers import Verify
from metis_agent.rollouts.runner import Rollout, Rollouts, group_rollouts
from metis_agent.types import Question, Trajectory

__all__ = [
    "LOSS_TYPES",
    "HDPOConfig",
    "Validation",
    "check_arguments",
    "check_sampler",
    "last_checkpoint",
    "save_whole",
    "step_metrics",
    "validation_metrics",
    "without_tokens",
]

LOSS_TYPES = ("dapo", "grpo", "bnpo")
"""Those of TRL whose normaliser the tool channel can share."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class HDPOConfig(GRPOConfig):
    """Settings of an `HDPOTrainer`; those of TRL that are not named here keep their meaning.

    Defaults are the paper's (arXiv:2604.08545) where it gives them: G = 16, w_tool = 0.15, learning rate 1e-6, no KL
    term. Forced rollouts are ours; 0 and 0 is HDPO as published.

    Raises:
        ConfigurationError: A setting is out of range, or two don't fit together.
    """

    num_generations: int | None = _option(16, "G, rollouts of each question.")
    per_device_train_batch_size: int = _option(16, "Rollouts in a micro-batch of one process.")
    learning_rate: float = _option(1e-6, "Of the optimiser.")
    objective: str = _option("hdpo", "'hdpo', 'contrast', a baseline ('grpo', 'coupled', 'gdpo'), or a registered one.")
    w_acc: float = _option(1.0, "Weight of the accuracy channel.")
    w_tool: float = _option(0.15, "Weight of the tool channel: the price of a call.")
    alpha: float = _option(0.15, "Weight of r_tool in the scalar reward of 'coupled'.")
    price: float = _option(0.5, "w of 'contrast': the accuracy that a call may cost.")
    odds: float = _option(6.0, "m of 'contrast': log-odds at which a decision counts as made.")
    w_decision: float = _option(0.1, "Weight of the decision's loss in 'contrast'.")
    branch_weight: bool = _option(False, "Weight A_tool by how sure it is that answering directly does.")
    eps: float = _option(1e-4, "Added to the deviation of a group's rewards.")
    ddof: int = _option(1, "1 for the sample deviation, TRL's; 0 for the population's.")
    margin: float = _option(0.1, "Accuracy by which the direct branch may trail, with branch_weight.")
    forced_direct: int = _option(4, "Rollouts of a group that are made to answer directly.")
    forced_tool: int = _option(4, "Rollouts of a group that are made to call a tool.")
    forced_steps: int = _option(
        1, "Decisions of a run at which they are made to, in turn: 3 where runs call several times."
    )
    max_length: int | None = _option(None, "Tokens of one row, prompt included; longer rollouts are left out, counted.")
    bad_updates: int = _option(3, "Updates running whose gradient may be no number; each is skipped and counted.")

    def __post_init__(self) -> None:
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        _ = self.hdpo_objective, self.groups
        if self.bad_updates < 1:
            raise ConfigurationError(f"bad_updates={self.bad_updates!r}: at least 1; 3 is usual.")
        check_arguments(self, self.groups, self.hdpo_objective)

    @property
    def hdpo_objective(self) -> Objective:
        """Which advantages."""
        names = {each.name for each in fields(Objective)} - {"name"}
        return Objective(
            name=self.objective,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def groups(self) -> StratifiedGroups:
        """How the rollouts of a question start."""
        return StratifiedGroups(
            size=self.num_generations or 0, direct=self.forced_direct, tool=self.forced_tool, steps=self.forced_steps
        )


def check_arguments(args: GRPOConfig, groups: StratifiedGroups, objective: Objective = Objective()) -> None:
    """Refuse what would train on something else than was meant.

    Raises:
        ConfigurationError: With the setting, the rule and the remedy.
    """
    if args.num_generations != groups.size:
        raise ConfigurationError(
            f"num_generations={args.num_generations!r} but groups.size={groups.size!r}: both are G, set them equal"
        )
    if objective.name == "contrast" and not (groups.direct and groups.tool):
        raise ConfigurationError(
            f"forced_direct={groups.direct!r}, forced_tool={groups.tool!r} with the objective 'contrast': it compares "
            "the branches of each group, so force at least one rollout down each; 4 of 16 is usual."
        )
    if args.loss_type not in LOSS_TYPES:
        raise ConfigurationError(
            f"loss_type={args.loss_type!r}: the tool channel can share the normaliser of {', '.join(LOSS_TYPES)}"
        )
    generation = args.steps_per_generation or 1
    rollouts = args.per_device_train_batch_size * generation
    if rollouts % groups.size:
        raise ConfigurationError(
            f"per_device_train_batch_size={args.per_device_train_batch_size!r} times steps_per_generation="
            f"{args.steps_per_generation!r} is {rollouts} rollouts a process, not a multiple of num_generations="
            f"{groups.size!r}: a group is never spread over processes. Raise either to fit."
        )
    if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise ConfigurationError(
            f"eval_strategy={args.eval_strategy!r}: TRL would score rewards on forced groups. Leave it 'no' and give "
            "the trainer validation=Validation(...), which measures the agent as it is deployed."
        )
    updates = generation * args.num_iterations / args.gradient_accumulation_steps
    every = args.save_steps
    saves = str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps" and every >= 1
    if saves and updates > 1 and every % updates:
        raise ConfigurationError(
            f"save_steps={every!r}, but one set of rollouts serves {updates:g} updates: a checkpoint amid them can't "
            "be resumed exactly. Make it a multiple."
        )


_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill may have left a torn one behind it.

    The trainer writes `trainer_state.json` last, so a checkpoint is whole where that can be read.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def save_whole(trainer: Any, folder: Path) -> None:
    """Save what was trained as a model that loads by itself: adapters are merged into it.

    Where FSDP or DeepSpeed has spread the model over processes, the adapters are saved alone.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload") or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(folder))
    elif trainer.accelerator.is_main_process:
        model.merge_and_unload().save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Measures the agent while it is trained.

    Raises:
        ConfigurationError: There is nothing to ask, or `every` is below 1.
    """

    questions: Sequence[Question]
    """Held out of training."""
    rollouts: Rollouts
    """The agent as it is deployed; its model is the trained one."""
    every: int = 10
    """Updates between two measurements; one more comes before the first update."""
    probes: Probes = Probes()

    def __post_init__(self) -> None:
        if self.every < 1 or not self.questions:
            raise ConfigurationError(
                f"Validation every {self.every!r} updates on {len(self.questions)} questions: at least 1 of each."
            )

    def plan(self, step: int, process: int, processes: int, *, seed: int) -> list[Rollout]:
        """The rollouts of one process: those of every `processes`-th question."""
        own = self.questions[process::processes]
        name = f"validation/step-{step}"
        return [
            *group_rollouts(own, ("free",), name=f"{name}/free", seed=seed),
            *group_rollouts(own, self.probes.branches, name=f"{name}/probe", seed=seed),
        ]


def validation_metrics(trajectories: Sequence[Trajectory], verify: Verify, *, seed: int) -> dict[str, float]:
    """Accuracy, tool rate, redundant rate and necessary recall of free runs, judged by the forced ones beside them."""
    by_branch: dict[str, list[Trajectory]] = {"free": [], "direct": [], "tool": []}
    for run in trajectories:
        by_branch[run.branch].append(run)
    finished = [run for run in by_branch["free"] if run.status == "finished"]
    failed = float(len(trajectories) - sum(run.status == "finished" for run in trajectories))
    if not finished:
        return {"validation/failed": failed}
    overall = evaluate(
        finished,
        direct_right=share_right(by_branch["direct"], verify),
        tool_right=share_right(by_branch["tool"], verify),
        verify=verify,
        resamples=1,
        seed=seed,
    ).overall
    names = ("accuracy", "tool_rate", "redundant_rate", "necessary_recall", "calls_per_question")
    values = {name: getattr(overall, name).value for name in names}
    known = {f"validation/{name}": float(value) for name, value in values.items() if value is not None}
    return {**known, "validation/failed": failed}


def without_tokens(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """What scoring needs of runs, small enough to send to other processes."""
    return [replace(run, messages=(), calls=()) for run in trajectories]


def step_metrics(scores: Scores, channels: Channels, groups: StratifiedGroups) -> dict[str, float]:
    """What the training curve shows, from the step's free rollouts; NaN where the step can't tell.

    A question counts as known where every forced direct rollout was right, as needing a tool where none was.
    """
    starts = list(zip(groups.branches(), groups.forced_at(), strict=True))
    free = np.array([start == ("free", -1) for start in starts]) & ~scores.excluded
    direct = np.array([start == ("direct", 0) for start in starts]) & ~scores.excluded
    called = scores.T > 0
    right = (direct & scores.correct).sum(1)
    probed = direct.sum(1)
    known = (probed > 0) & (right == probed)
    needed = (probed > 0) & (right == 0)

    def share(of: Any, among: Any) -> float:
        return float((of & among).sum() / among.sum()) if among.any() else float("nan")

    return {
        "hdpo/accuracy": share(scores.correct, free),
        "hdpo/tool_rate": share(called, free),
        "hdpo/calls": float(scores.T[free].mean()) if free.any() else float("nan"),
        "hdpo/redundant_rate": share(called, free & known[:, None]),
        "hdpo/necessary_recall": share(called, free & needed[:, None]),
        "hdpo/rho": float(channels.rho.mean()),
        "hdpo/excluded": float(scores.excluded.sum()),
        **{f"hdpo/excluded/{reason.replace(' ', '_')}": float(n) for reason, n in scores.exclusions.items()},
    }


def check_sampler(trainer: Any, sampler: nn.Module | None) -> None:
    """Whether the rollouts have a model to sample from.

    Raises:
        ConfigurationError: FSDP 2 has spread the weights and there is no copy, or the copy is another model.
    """
    if sampler is None:
        if trainer._dist.fsdp_version == 2 and not trainer.use_vllm:
            raise ConfigurationError(
                "FSDP 2 spreads the weights, and processes that sample different numbers of tokens from them would "
                "wait for each other for ever. Sample from vLLM (use_vllm=True), or give the trainer sampler=, a "
                "second copy of the model that the agent's chat model samples from."
            )
        return
    ours, theirs = (sorted(name for name, _ in model.named_parameters()) for model in (trainer.model, sampler))
    if ours != theirs:
        first = next(iter(set(ours) ^ set(theirs)))
        raise ConfigurationError(
            f"sampler has other weights than the model that is trained ({first!r} is in one only): load both from the "
            "same checkpoint; adapters (LoRA) can't be sampled from a copy."
        )
    sampler.to(trainer.accelerator.device)
