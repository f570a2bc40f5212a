"""HDPO on TRL: `GRPOTrainer` whose rollouts are runs of the agent's graph, with a second surrogate in the loss.

    L = w_acc L_clip(A_acc) + w_tool L_clip(A_tool)        (arXiv:2604.08545, "hierarchical decoupled" objective)

TRL does what it does well: batching, the forward pass, the accuracy surrogate, optimisation, checkpoints,
distribution, logging. Here the rollouts come from the graph (whole groups in a process), their tokens from
`token_sequences`, the advantages from `advantages` over the groups of all processes; TRL gets both as a `StepBatch`.
The tool surrogate, or the decision's loss of `contrast`, is added in `_compute_loss`, with the log-probabilities of
TRL's one forward pass. With w_tool = 0 the update is TRL's own.

What goes wrong is counted: a rollout that failed is left out, an update whose gradient is no number is skipped, and
where nothing is left to learn from, or nothing can be saved, training ends with an error, to be resumed.

Rollouts are sampled from a whole model. Where DeepSpeed or FSDP 1 has spread its weights over the processes, they are
gathered for as long as the rollouts take. FSDP 2 gathers layer by layer, in step with the other processes, and
processes whose rollouts differ in length are not in step: there a second, whole copy of the model is sampled from, and
gets the weights before each time.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import unwrap_model_for_generation

from metis_agent.errors import ConfigurationError, InfrastructureError, StorageError
from metis_agent.hdpo import exploration
from metis_agent.hdpo.advantages import Objective, advantages
from metis_agent.hdpo.config import (
    HDPOConfig,
    Validation,
    check_arguments,
    check_sampler,
    step_metrics,
    validation_metrics,
    without_tokens,
)
from metis_agent.hdpo.contrast import Opening, decision_loss, openings
from metis_agent.hdpo.exploration import StratifiedGroups, balance_weights, decisions_of, rollout_weights
from metis_agent.hdpo.loss import Normaliser, clipped_surrogate
from metis_agent.hdpo.rewards import Scores, excluding, pooled, score
from metis_agent.hdpo.token_sequences import (
    PIXELS,
    Row,
    RowImages,
    Rows,
    SeesImages,
    Segment,
    StepBatch,
    images_of,
    in_pieces,
    rows_learnt,
    rows_of,
)
from metis_agent.judging.verifiers import Verify
from metis_agent.judging.verifiers import verify as default_verify
from metis_agent.rollouts.runner import Rollouts, group_rollouts, groups_of
from metis_agent.types import Question, Trajectory

__all__ = ["HDPOConfig", "HDPOTrainer", "Validation", "copy_weights", "unsharded_model"]


class HDPOTrainer(GRPOTrainer):
    """Trains a policy on group rollouts of the agent that it drives.

    Args:
        model: The causal LM that the agent's chat model samples from: one object, so that rollouts see each update
            (or see `sampler`).
        tokenizer: Its tokenizer.
        args: An `HDPOConfig`, or TRL's configuration with `objective` and `groups` beside it.
        questions: What to learn from, one group each a step.
        rollouts: Runs them through the graph.
        objective: Which advantages; by default what `args` says, else HDPO.
        groups: How the rollouts of a group start; likewise.
        verify: Judges the answers.
        validation: Measures the agent on held-out questions as it is trained.
        images: Reads the pictures of a model that sees: the `ImageReader` of its processor.
        sampler: A second copy of the model, for FSDP 2 without vLLM: the agent's chat model samples from this one, and
            it gets the weights before each set of rollouts.
        seed: Of the rollouts; with the step and the question it seeds all sampling. By default that of `args`.
        **trainer: Further arguments of `GRPOTrainer`, such as `peft_config`, `callbacks` or `optimizers`.

    Raises:
        ConfigurationError: Settings don't fit together, or two questions share an id.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: GRPOConfig,
        *,
        questions: Sequence[Question],
        rollouts: Rollouts,
        objective: Objective | None = None,
        groups: StratifiedGroups | None = None,
        verify: Verify = default_verify,
        validation: Validation | None = None,
        images: SeesImages | None = None,
        sampler: PreTrainedModel | None = None,
        seed: int | None = None,
        **trainer: Any,
    ) -> None:
        own = args if isinstance(args, HDPOConfig) else None
        self._objective = objective or (own.hdpo_objective if own else Objective())
        self._groups = groups or (own.groups if own else StratifiedGroups())
        check_arguments(args, self._groups, self._objective)
        self._questions = {question.id: question for question in questions}
        if len(self._questions) != len(questions):
            raise ConfigurationError(f"{len(questions)} questions have {len(self._questions)} ids: make them distinct")
        self._rollouts, self._verify, self._validation = rollouts, verify, validation
        self._rollout_seed = int(args.seed) if seed is None else seed
        self._max_length = own.max_length if own else None
        self._bad_updates_allowed, self._bad_updates = (own.bad_updates if own else 3), 0
        self._shared_log_probs: Tensor | None = None
        self._learnt: Tensor | None = None
        self._reader = images
        self._row_images: RowImages | None = None
        self._placeholder = cast(int, tokenizer.convert_tokens_to_ids(images.placeholder)) if images else -1
        logging.getLogger("trl.trainer.grpo_trainer").addFilter(_no_reward_is_no_news)
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
        check_sampler(self, sampler)
        self._sampler = sampler
        if validation is not None:
            self.add_callback(_Validate(self))

    # --- rollouts --------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        questions = [self._questions[row["question_id"]] for row in inputs][:: self._groups.size]
        step = self._step_batch = self._roll_out(questions)
        # Rollouts that split take more rows than TRL asked for.
        further = [dict(inputs[0]) for _ in range(len(step.layout) - len(inputs))]
        batch: dict[str, Any] = super()._generate_and_score_completions([*inputs, *further])
        # TRL made advantages from the reward that it logs; ours replace them.
        batch["advantages"] = step.by_row(self._objective.w_acc * step.channels.acc).to(self._device)
        if self._objective.name == "contrast":
            which, batch["contrasts"] = step.decisions(batch["completion_ids"].shape[1], self._device)
            batch["openings"] = which
            # What to write, apart from whether to call.
            batch["advantages"] = torch.where(which == 0, batch["advantages"][:, None], 0.0)
            batch["num_questions"] = torch.tensor(len(questions))
        if self._objective.name == "hdpo" and self._objective.w_tool:
            batch["tool_advantages"] = step.by_row(step.channels.tool).to(self._device)
        if self._row_images is not None:
            batch |= self._row_images.inputs(torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1))
            self._row_images = None
        return batch

    def _roll_out(self, questions: Sequence[Question]) -> StepBatch:
        """One group per question."""
        step = self.state.global_step
        name, branches, at = f"train/step-{step}", self._groups.branches(), self._groups.forced_at()
        plan = group_rollouts(questions, branches, name=name, seed=self._rollout_seed, at=at)
        with unsharded_model(self, self._sampler):
            trajectories = self._rollouts.collect(plan)
        rows = rows_of(trajectories, max_length=self._max_length, images=self._images_of if self._reader else None)
        own = excluding(score(groups_of(trajectories, self._groups.size), self._verify), rows.unusable)
        # Some objectives normalise over the batch, and the metrics are of all groups: so every process scores them all.
        called, probability = decisions_of(trajectories, self._groups)
        told = ~np.isnan(probability)
        later = exploration.later_decisions(trajectories, self._groups, told)
        parts: list[tuple[Scores, Any, Any, Any]] = gather_object(
            [(own, called, told, exploration.cut(later, self._groups))]
        )
        everyone = pooled([part[0] for part in parts])
        self._check_something_is_left(everyone, trajectories)
        decided, apart, ended = (np.concatenate([part[place] for part in parts]) for place in (1, 2, 3))
        channels = advantages(self._objective, everyone, called=decided, apart=apart, cut=ended)
        first = sum(len(part[0].excluded) for part in parts[: self.accelerator.process_index])
        self._note(step_metrics(everyone, channels, self._groups))
        mine = channels.of_groups(first, len(own.excluded))
        decisions: dict[tuple[int, int], Opening] = {}
        if self._objective.name == "contrast":
            weights = balance_weights(called, probability, self._groups, later)
            decisions = openings(
                trajectories, own.r_ans, own.cost, ~own.excluded, mine.contrast.tolist(), told,
                price=self._objective.price, forced_at=at,
            )  # fmt: skip
        else:
            both = (self._objective.w_acc * mine.acc + self._objective.w_tool * mine.tool).double().numpy()
            weights = rollout_weights(both, called, probability, self._groups, later)
        return StepBatch(layout=self._lay_out(rows), scores=own, channels=mine, weights=weights, openings=decisions)

    def _lay_out(self, rows: Rows) -> list[Row]:
        """This process's rows; every process has as many."""
        args = cast(GRPOConfig, self.args)
        multiple = math.lcm(self._groups.size, args.steps_per_generation or 1)
        counts = torch.tensor([rows.padded_count(multiple), rows.usable, len(rows.further)], device=self._device)
        padded, usable, further = self.accelerator.gather(counts).view(-1, 3).T
        segments = (usable.sum() + further.sum()) / usable.sum().clamp(min=1)
        self._note({"hdpo/segments": segments.item(), "hdpo/split": float(further.sum())})
        total = int(padded.max())
        layout = rows.laid_out(total, cast(Normaliser, args.loss_type))
        if self._reader is not None:
            self._row_images = RowImages(layout, rows.laid_out_images(total), self._reader, cast(Any, self.model).dtype)
        return layout

    def _images_of(self, trajectory: Trajectory, found: Sequence[Segment]) -> Sequence[Sequence[Any]]:
        assert self._reader is not None
        return images_of(trajectory, found, self._reader, self._placeholder)

    def _check_something_is_left(self, everyone: Scores, trajectories: Sequence[Trajectory]) -> None:
        if not everyone.excluded.all():
            return
        first = next((run.error for run in trajectories if run.error), "")
        raise InfrastructureError(
            f"none of the {everyone.excluded.size} rollouts of step {self.state.global_step} can be trained on: "
            f"{dict(everyone.exclusions)!r}; the first error is {first!r}. Mend what failed and run again: finished "
            "rollouts are kept."
        )

    def _note(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    @property
    def _mode(self) -> Literal["train", "eval"]:
        """TRL's key for metrics."""
        return "train" if self.model is not None and self.model.training else "eval"

    @property
    def _device(self) -> torch.device:
        return self.accelerator.device  # type: ignore[no-any-return]

    # --- loss ------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if self._learnt is not None:
            learnt, self._learnt = self._learnt, None
            model, ids, attention, width = args

            def read(*piece: Any) -> tuple[Tensor, Tensor]:
                found: tuple[Tensor, Tensor, None] = super(HDPOTrainer, self)._get_per_token_logps_and_entropies(
                    model, *piece, compute_entropy=True
                )
                return found[:2]

            self._shared_log_probs, entropies = in_pieces(read, ids, attention, width, learnt)
            return self._shared_log_probs, entropies, None
        if self._row_images is not None:
            # TRL asks for the old log-probabilities of the whole batch, and knows of no pictures yet.
            kwargs |= self._row_images.inputs(args[1])
        if kwargs.get("num_images") is not None and not sum(kwargs["num_images"]):
            kwargs |= dict.fromkeys(PIXELS)  # a micro-batch of text
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._shared_log_probs = found[0]
        return found

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        one_pass = self.beta or self.aux_loss_enabled or PIXELS[0] in inputs or self.accelerator.num_processes > 1
        self._learnt = None if one_pass else rows_learnt(inputs)
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        log_probs, self._shared_log_probs = self._shared_log_probs, None
        accumulated = self.current_gradient_accumulation_steps if self._mode == "train" else 1
        self._note({"hdpo/acc_loss": self._mean(loss.detach()) * accumulated})
        if log_probs is not None and "contrasts" in inputs:
            return loss + self._objective.w_decision * self._decision_loss(log_probs, inputs, accumulated)
        if log_probs is None or "tool_advantages" not in inputs:
            return loss
        return loss + self._objective.w_tool * self._tool_loss(log_probs, inputs, accumulated)

    def _tool_loss(self, log_probs: Tensor, inputs: dict[str, Any], accumulated: int) -> Tensor:
        """L_clip(A_tool) with the normaliser that TRL gives L_clip(A_acc)."""
        args = cast(GRPOConfig, self.args)
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
            # TRL corrects the accuracy channel by it where rollouts come from vLLM.
            correction=inputs.get("importance_sampling_ratio"),
        )
        loss = surrogate.loss if total is not None else surrogate.loss / accumulated
        self._note(
            {
                "hdpo/tool_loss": self._mean(loss.detach()) * accumulated,
                "hdpo/tool_clip_fraction": self._mean(surrogate.clip_fraction),
            }
        )
        return loss

    def _decision_loss(self, log_probs: Tensor, inputs: dict[str, Any], accumulated: int) -> Tensor:
        """L_dec, a mean over the questions of one optimiser step."""
        places = torch.arange(1, inputs["contrasts"].shape[1] + 1, device=log_probs.device)
        log_p = torch.where(inputs["openings"][..., None] == places, log_probs[..., None], 0.0).sum(1)  # [B, S]
        Delta = inputs["contrasts"]
        # Where there is no decision, log p is 0 and the contrast as well: neither may reach the gradient.
        each = decision_loss(torch.where(Delta == 0, -1.0, log_p), Delta, margin=self._objective.odds)
        questions = inputs["num_questions"]
        if self._mode == "train":
            questions = questions * accumulated / cast(GRPOConfig, self.args).steps_per_generation
        loss: Tensor = each.sum() / questions
        self._note({"hdpo/decision_loss": self._mean(loss.detach()) * accumulated})
        return loss

    def _mean(self, value: Tensor) -> float:
        """Over the processes."""
        return float(self.accelerator.gather(value).mean().item())

    # --- what goes wrong -------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """TRL's, the same in every process; an update whose gradient is no number is skipped and counted."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        bad = norm is not None and not math.isfinite(float(norm))
        self._note({"hdpo/skipped_updates": float(bad)})
        self._bad_updates = self._bad_updates + 1 if bad else 0
        if not bad:
            return norm
        if self._bad_updates >= self._bad_updates_allowed or self.is_deepspeed_enabled:
            raise InfrastructureError(
                f"the gradient was not a number in {self._bad_updates} updates running, the last at step "
                f"{self.state.global_step}. Go on from the last checkpoint with a smaller learning_rate, or in "
                "float32 or bfloat16."
            )
        for parameter in model.parameters():
            parameter.grad = None  # the optimiser passes over it: weights and moments stay as they are
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
        except Exception as error:  # a full disk is an OSError, a SafetensorError or a RuntimeError of torch's writer
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"the checkpoint {str(folder)!r} could not be written: {type(error).__name__}: {error}. What there was "
                "of it is removed. Make room, and run again to go on from the one before."
            ) from error

    # --- validation ------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """Measure the agent on the validation questions now; every process does its share.

        Raises:
            ConfigurationError: The trainer was made without `validation`.
        """
        if self._validation is None:
            raise ConfigurationError("validation=None: pass validation=Validation(...) to the trainer.")
        plan = self._validation.plan(
            self.state.global_step, self.accelerator.process_index, self.accelerator.num_processes,
            seed=self._rollout_seed,
        )  # fmt: skip
        with unsharded_model(self, self._sampler):
            runs = self._validation.rollouts.collect(plan)
        return validation_metrics(gather_object(without_tokens(runs)), self._verify, seed=self._rollout_seed)


class _Validate(TrainerCallback):
    """Before the first update, and every so many."""

    def __init__(self, trainer: HDPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self._trainer.log(self._trainer.validate())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        validation = self._trainer._validation
        if validation is not None and state.global_step % validation.every == 0:
            # Into the step's own entry: TRL's `log` would end that entry here.
            self._trainer._note(self._trainer.validate())


def _graph_rollouts(prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
    """TRL's hook: the rows that the trainer has laid out for these prompts."""
    step: StepBatch = trainer._step_batch
    return step.rollouts()


def _accuracy_reward(completions: Sequence[Any], r_acc: Sequence[float | None], **_: Any) -> list[float | None]:
    """What TRL logs as the reward."""
    return list(r_acc)


def _no_reward_is_no_news(record: logging.LogRecord) -> bool:
    """TRL warns of every row without a reward; here those are counted, and further segments of a rollout have none."""
    return "reward functions returned None" not in record.getMessage()


@torch.no_grad()
def copy_weights(model: nn.Module, sampler: nn.Module) -> None:
    """Give a whole copy the weights of a model that may be spread; every process must call it."""
    # By their order: wrapping changes the names.
    for theirs, parameter in zip(sampler.parameters(), model.parameters(), strict=True):
        weight = parameter.detach()
        theirs.copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)


@contextmanager
def unsharded_model(trainer: Any, sampler: nn.Module | None) -> Iterator[None]:
    """While it lasts, the model that rollouts sample from is whole and has the trained weights."""
    spread = trainer.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sampler is not None:
        copy_weights(trainer.model, sampler)
        yield
    elif not spread or trainer.use_vllm:
        yield
    else:
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            ),
            torch.no_grad(),
            trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
        ):
            yield
