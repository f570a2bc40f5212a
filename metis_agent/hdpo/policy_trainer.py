"""HDPO on TRL: `GRPOTrainer` whose rollouts are runs of the agent's graph, with a second surrogate in the loss.

    L = w_acc L_clip(A_acc) + w_tool L_clip(A_tool)        (arXiv:2604.08545, "hierarchical decoupled" objective)

TRL does what it does well: batching, the forward pass, the accuracy surrogate, optimisation, checkpoints,
distribution, logging. Four methods differ: rollouts come from the graph, advantages from `hdpo.advantages`,
the tool surrogate is added in `_compute_loss`, and the log-probabilities of TRL's one forward pass serve both.
With w_tool = 0 the update is TRL's own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from metis_agent.errors import ConfigurationError, InfrastructureError
from metis_agent.hdpo.advantages import Channels, Objective, advantages
from metis_agent.hdpo.exploration import StratifiedGroups, decision_weights
from metis_agent.hdpo.loss import Normaliser, clipped_surrogate
from metis_agent.hdpo.rewards import Scores, Verify, score
from metis_agent.hdpo.rollouts import Rollouts, group_rollouts, groups_of
from metis_agent.hdpo.segments import Segment, segments
from metis_agent.hdpo.verifiers import verify as default_verify
from metis_agent.types import Question, Trajectory

__all__ = ["HDPOTrainer"]

_LOSS_TYPES = ("dapo", "grpo", "bnpo")


class HDPOTrainer(GRPOTrainer):
    """Trains a policy on group rollouts of the agent that it drives.

    Args:
        model: The causal LM that the agent's chat model samples from: one object, so that rollouts see each update.
        tokenizer: Its tokenizer.
        args: TRL's configuration; `num_generations` must equal `groups.size`, and the loss type must be one
            whose normaliser the tool channel can share ("dapo", "grpo" or "bnpo").
        questions: What to learn from, one group each a step.
        rollouts: Runs them through the graph.
        objective: Which advantages; HDPO by default, or a baseline.
        groups: How the rollouts of a group start.
        verify: Judges the answers.
        seed: Of the rollouts; with the step and the question it seeds all sampling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        *,
        questions: Sequence[Question],
        rollouts: Rollouts,
        objective: Objective = Objective(),
        groups: StratifiedGroups = StratifiedGroups(),
        verify: Verify = default_verify,
        seed: int = 0,
        **trainer: Any,
    ) -> None:
        if args.num_generations != groups.size:
            raise ConfigurationError(
                f"num_generations={args.num_generations!r} but groups.size={groups.size!r}: both are G, set them equal"
            )
        if args.loss_type not in _LOSS_TYPES:
            raise ConfigurationError(
                f"loss_type={args.loss_type!r}: the tool channel can share the normaliser of {', '.join(_LOSS_TYPES)}"
            )
        self._questions = {question.id: question for question in questions}
        if len(self._questions) != len(questions):
            raise ConfigurationError(f"{len(questions)} questions have {len(self._questions)} ids: make them distinct")
        self._rollouts, self._objective, self._groups = rollouts, objective, groups
        self._verify, self._rollout_seed = verify, seed
        self._shared_log_probs: Tensor | None = None
        super().__init__(
            model=model,
            processing_class=tokenizer,
            args=args,
            reward_funcs=[_accuracy_reward],
            train_dataset=Dataset.from_list(
                [
                    {"prompt": [{"role": "user", "content": question.text}], "question_id": question.id}
                    for question in questions
                ]
            ),
            rollout_func=_graph_rollouts,
            **trainer,
        )

    # --- rollouts --------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._batch_questions = [self._questions[row["question_id"]] for row in inputs][:: self._groups.size]
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        # TRL made advantages from the reward that it logs; ours replace them.
        batch["advantages"] = self._by_token(self._objective.w_acc * self._channels.acc, batch["completion_ids"])
        if self._objective.name == "hdpo" and self._objective.w_tool:
            batch["tool_advantages"] = self._by_token(self._channels.tool, batch["completion_ids"])
        return batch

    def _by_token(self, advantages_P_G: Tensor, completion_ids: Tensor) -> Tensor:
        """Advantages as TRL takes them: [B], or [B, T] where forced rollouts give the decision a weight of its own."""
        A = advantages_P_G.flatten().to(completion_ids.device)
        if not self._groups.tool:
            return A
        # The first token is the decision: an answer begins with it, and so does a call.
        by_token = A[:, None].repeat(1, completion_ids.shape[1])
        by_token[:, 0] *= torch.as_tensor(self._weights, dtype=A.dtype, device=A.device).flatten()
        return by_token

    def _roll_out(self) -> dict[str, list[Any]]:
        """One group per question; each trajectory is one row of tokens."""
        step = self.state.global_step
        plan = group_rollouts(
            self._batch_questions, self._groups.branches(), name=f"train/step-{step}", seed=self._rollout_seed
        )
        trajectories = self._rollouts.collect(plan)
        rows = [_row(trajectory) for trajectory in trajectories]
        blank = next((row for row in rows if row), None)
        if blank is None:
            raise InfrastructureError(
                f"none of the {len(rows)} rollouts of step {step} can be trained on; the first says "
                f"{trajectories[0].error!r}. Mend what failed and run again: finished rollouts are kept."
            )
        scores = _without(score(groups_of(trajectories, self._groups.size), self._verify), rows)
        self._channels = advantages(self._objective, scores)
        both = self._objective.w_acc * self._channels.acc + self._objective.w_tool * self._channels.tool
        self._weights = decision_weights(both.double().numpy(), *_decisions(trajectories, self._groups), self._groups)
        metrics = self._metrics[self._mode]
        for name, value in _step_metrics(scores, self._channels, self._groups).items():
            metrics[name].append(value)
        return {
            "prompt_ids": [list((row or blank).prompt_ids) for row in rows],
            "completion_ids": [list((row or blank).completion_ids) for row in rows],
            "logprobs": [list((row or blank).log_probs) for row in rows],
            # A row that can't be trained on keeps its place in the batch, with every token masked out.
            "env_mask": [list(row.mask) if row else [0] * len(blank.mask) for row in rows],
            "r_acc": [None if np.isnan(reward) else float(reward) for reward in scores.r_acc.flatten()],
        }

    @property
    def _mode(self) -> Literal["train", "eval"]:
        """TRL's key for metrics."""
        return "train" if self.model is not None and self.model.training else "eval"

    # --- loss ------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._shared_log_probs = found[0]
        return found

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        log_probs, self._shared_log_probs = self._shared_log_probs, None
        if log_probs is None or "tool_advantages" not in inputs:
            return loss
        tool_loss = self._tool_loss(log_probs, inputs)
        return loss + self._objective.w_tool * tool_loss

    def _tool_loss(self, log_probs: Tensor, inputs: dict[str, Any]) -> Tensor:
        """L_clip(A_tool) with the normaliser that TRL gives L_clip(A_acc)."""
        args = cast(GRPOConfig, self.args)
        accumulated = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        total = None
        if args.loss_type == "dapo":
            # TRL counts the tokens of the generation batch; this is the share of one optimiser step.
            total = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self._mode == "train":
                total = total * accumulated / args.steps_per_generation
        surrogate = clipped_surrogate(
            log_probs,
            inputs.get("old_per_token_logps", log_probs.detach()),
            inputs["tool_advantages"],
            inputs["completion_mask"] * inputs.get("tool_mask", 1),
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            normaliser=cast(Normaliser, args.loss_type),
            total_tokens=total,
        )
        metrics = self._metrics[self._mode]
        metrics["hdpo/tool_loss"].append(self.accelerator.gather(surrogate.loss.detach()).mean().item())
        metrics["hdpo/tool_clip_fraction"].append(self.accelerator.gather(surrogate.clip_fraction).mean().item())
        return surrogate.loss if total is not None else surrogate.loss / accumulated


def _graph_rollouts(prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
    """TRL's hook; the prompts are those of the questions that the trainer noted."""
    found: dict[str, list[Any]] = trainer._roll_out()
    return found


def _accuracy_reward(completions: Sequence[Any], r_acc: Sequence[float | None], **_: Any) -> list[float | None]:
    """What TRL logs as the reward."""
    return list(r_acc)


def _row(trajectory: Trajectory) -> Segment | None:
    """The tokens to train on; `None` for a failed run, and for one whose prompts do not extend each other."""
    if trajectory.status == "failed":
        return None
    found = segments(trajectory)
    return found[0] if len(found) == 1 else None


def _decisions(
    trajectories: Sequence[Trajectory], groups: StratifiedGroups
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """[P, G]: whether a run began with a call; [P]: how likely a call is, read off the forced tool rollouts."""
    first = [trajectory.calls[0] if trajectory.calls else None for trajectory in trajectories]
    called = np.array([bool(call and call.tool_calls) for call in first]).reshape(-1, groups.size)
    forced = [
        math.exp(sum((call.log_probs or ())[: call.forced])) if call and call.forced else math.nan for call in first
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of a group in which none was forced is NaN
        probability = np.nanmean(np.array(forced).reshape(-1, groups.size), axis=1)
    return called, probability


def _without(scores: Scores, rows: Sequence[Segment | None]) -> Scores:
    """The scores, with what can't be trained on excluded and counted."""
    unusable = np.array([row is None for row in rows]).reshape(scores.excluded.shape)
    split = int((unusable & ~scores.excluded).sum())
    exclusions = {**scores.exclusions, "several segments": split} if split else scores.exclusions
    return replace(scores, excluded=scores.excluded | unusable, exclusions=exclusions)


def _step_metrics(scores: Scores, channels: Channels, groups: StratifiedGroups) -> dict[str, float]:
    """What the training curve shows, from the step's free rollouts; NaN where the step can't tell.

    A question counts as known where every forced direct rollout was right, as needing a tool where none was.
    """
    free = np.array([branch == "free" for branch in groups.branches()]) & ~scores.excluded
    direct = np.array([branch == "direct" for branch in groups.branches()]) & ~scores.excluded
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
        "hdpo/redundant_rate": share(called, free & known[:, None]),
        "hdpo/necessary_recall": share(called, free & needed[:, None]),
        "hdpo/rho": float(channels.rho.mean()),
        "hdpo/excluded": float(scores.excluded.sum()),
    }
