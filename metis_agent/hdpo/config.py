"""`HDPOConfig`: TRL's `GRPOConfig` with what HDPO adds, checked before any work starts; where a stopped run goes on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups

__all__ = ["LOSS_TYPES", "HDPOConfig", "check_arguments", "last_checkpoint"]

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
    objective: str = _option("hdpo", "'hdpo', 'contrast', or a baseline: 'grpo', 'coupled' or 'gdpo'.")
    w_acc: float = _option(1.0, "Weight of the accuracy channel.")
    w_tool: float = _option(0.15, "Weight of the tool channel: the price of a call.")
    alpha: float = _option(0.15, "Weight of r_tool in the scalar reward of 'coupled'.")
    price: float = _option(0.5, "w of 'contrast': the accuracy that a call may cost.")
    odds: float = _option(4.0, "m of 'contrast': log-odds at which a decision counts as made.")
    w_decision: float = _option(1.0, "Weight of the decision's loss in 'contrast'.")
    branch_weight: bool = _option(False, "Weight A_tool by how sure it is that answering directly does.")
    margin: float = _option(0.1, "Accuracy by which the direct branch may trail, with branch_weight.")
    forced_direct: int = _option(4, "Rollouts of a group that are made to answer directly.")
    forced_tool: int = _option(4, "Rollouts of a group that are made to call a tool.")
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
        return Objective(
            name=self.objective,  # type: ignore[arg-type]  # checked by Objective itself
            w_acc=self.w_acc,
            w_tool=self.w_tool,
            alpha=self.alpha,
            price=self.price,
            odds=self.odds,
            w_decision=self.w_decision,
            branch_weight=self.branch_weight,
            margin=self.margin,
        )

    @property
    def groups(self) -> StratifiedGroups:
        """How the rollouts of a question start."""
        return StratifiedGroups(size=self.num_generations or 0, direct=self.forced_direct, tool=self.forced_tool)


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
