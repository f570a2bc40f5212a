"""From the file of `metis train policy` to its trainer: model, agent, rollouts, judge and settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_agent.cli.curate_parts import open_tools
from metis_agent.cli.policy_run import PolicyRun, check_reporters, processes, read_questions_of
from metis_agent.errors import ConfigurationError

if TYPE_CHECKING:
    from metis_agent.agent import MetisAgent
    from metis_agent.gates.base import Gate
    from metis_agent.hdpo.policy_trainer import HDPOTrainer

__all__ = ["build_trainer", "model_folder"]


def build_trainer(run: PolicyRun, loaded: Any, out: Path, *, callbacks: Sequence[Any]) -> HDPOTrainer:
    """The trainer of a run.

    Args:
        run: The file.
        loaded: The model, its tokenizer, and the processor of one that sees.
        out: Where everything goes.
        callbacks: What shows the progress.

    Raises:
        ConfigurationError: A setting does not fit.
    """
    from transformers import PrinterCallback

    from metis_agent.evaluation.agents import Probes
    from metis_agent.hdpo.policy_metrics import Validation
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.rollouts.runner import Rollouts

    tools, _ = open_tools(
        run.agent.tools, python=run.agent.python, corpus=Path(run.agent.corpus) if run.agent.corpus else None,
        sessions=min(run.sampling.concurrency, 32),
    )  # fmt: skip
    # FSDP 2 leaves no process a whole model: the agent then samples from a second copy.
    sampler = _second_copy(run) if _spread_by_fsdp() and run.sampling.backend == "local" else None
    chat = _chat(run, loaded, run.sampling.temperature, sampler)
    options: dict[str, Any] = {"concurrency": run.sampling.concurrency, "timeout": run.sampling.timeout}
    validation = None
    if run.questions.validation is not None:
        measured = _chat(run, loaded, run.validation.temperature, sampler)
        validation = Validation(
            questions=read_questions_of(run.questions.validation),
            rollouts=Rollouts(
                _agent(run, measured, tools), TrajectoryStore(out / "trajectories" / "validation"), **options
            ),
            every=run.validation.every * run.training.updates_per_step,
            probes=Probes(direct=run.validation.direct, tool=run.validation.tool),
        )
    trainer = HDPOTrainer(
        loaded.model,
        loaded.tokenizer,
        _arguments(run, out),
        questions=read_questions_of(run.questions.train),
        rollouts=Rollouts(_agent(run, chat, tools), TrajectoryStore(out / "trajectories" / "train"), **options),
        verify=_verify(run, out),
        validation=validation,
        images=_reader(loaded),
        sampler=sampler,
        callbacks=[*callbacks, _weights_version(chat)],
        peft_config=_lora(run),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: PolicyRun, out: Path) -> Any:
    import torch

    from metis_agent.hdpo.config import HDPOConfig

    training, sampling = run.training, run.sampling
    generation, accumulated = run.batches(processes())
    settings: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"), "num_generations": run.groups.size, "seed": training.seed,
        "forced_direct": run.groups.direct, "forced_tool": run.groups.tool,
        "objective": run.objective.name, "w_acc": run.objective.w_acc, "w_tool": run.objective.w_tool,
        "alpha": run.objective.alpha, "branch_weight": run.objective.branch_weight, "margin": run.objective.margin,
        "per_device_train_batch_size": training.micro_batch, "steps_per_generation": generation,
        "gradient_accumulation_steps": accumulated, "max_steps": training.steps * training.updates_per_step,
        "learning_rate": training.learning_rate, "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps, "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm, "epsilon": training.clip_low, "epsilon_high": training.clip_high,
        "beta": training.beta, "loss_type": training.loss_type, "max_length": training.max_length,
        "bf16": training.precision == "bfloat16", "activation_checkpointing": training.activation_checkpointing,
        "save_steps": training.checkpoint_every * training.updates_per_step,
        "save_total_limit": training.keep_checkpoints, "temperature": sampling.temperature,
        "max_completion_length": sampling.max_new_tokens, "report_to": check_reporters(run.report_to),
        "logging_steps": 1,
        "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "shuffle_dataset": run.questions.shuffle,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    if sampling.backend == "vllm":
        settings |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": sampling.url}
    try:
        return HDPOConfig(**{**settings, **training.trl})
    except TypeError as error:
        raise ConfigurationError(
            f"training.trl is {training.trl!r}: {error}; name settings of TRL's GRPOConfig."
        ) from None


def _chat(run: PolicyRun, loaded: Any, temperature: float, sampler: Any) -> Any:
    from metis_agent.models.local import LocalChatModel

    sampling = run.sampling
    if sampling.backend == "vllm":
        from metis_agent.models.vllm import VLLMChatModel

        return VLLMChatModel(
            base_url=sampling.url.rstrip("/") + "/v1", model=run.model.path, temperature=temperature,
            max_tokens=sampling.max_new_tokens,
        )  # fmt: skip
    return LocalChatModel(
        model=sampler or loaded.model, tokenizer=loaded.tokenizer, processor=loaded.processor,
        model_name=run.model.path, temperature=temperature, max_new_tokens=sampling.max_new_tokens,
    )  # fmt: skip


def _spread_by_fsdp() -> bool:
    """Whether `accelerate launch` was told to; it says so by the environment only."""
    return (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("FSDP_VERSION")) == ("true", "2")


def _second_copy(run: PolicyRun) -> Any:
    from metis_agent.models.checkpoint import load_checkpoint

    return load_checkpoint(model_folder(run), dtype=run.model.dtype).model


def _reader(loaded: Any) -> Any:
    """What reads the pictures of a model that sees."""
    if loaded.processor is None:
        return None
    from metis_agent.models.vision import ImageReader

    return ImageReader(loaded.processor)


def _agent(run: PolicyRun, chat: Any, tools: list[Any]) -> Callable[[Gate], MetisAgent]:
    from metis_agent.agent import create_metis_agent
    from metis_agent.rules.budget import Budget

    agent = run.agent
    message: dict[str, Any] = {} if agent.block_message is None else {"block_message": agent.block_message}
    return lambda gate: create_metis_agent(
        chat, tools, gate=gate, budget=Budget(calls=agent.calls), system_prompt=agent.system_prompt,
        tool_timeout=agent.tool_timeout, **message,
    )  # fmt: skip


def _verify(run: PolicyRun, out: Path) -> Any:
    from metis_agent.judging.verifiers import VERIFIERS, verify

    if run.judge is None:
        return verify
    from metis_agent.judging.cache import DiskCache
    from metis_agent.judging.judge import AnswerJudge

    judge = AnswerJudge(run.judge, cache=DiskCache(out / "judge"))
    return partial(verify, verifiers={**VERIFIERS, "judge": judge})


def _lora(run: PolicyRun) -> Any:
    lora = run.model.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )


def model_folder(run: PolicyRun) -> str:
    """Where the model is; "almanac" is the one that the package ships."""
    if run.model.path != "almanac":
        return run.model.path
    from importlib.resources import files

    return str(files("metis_agent.worlds.almanac") / "weights")


def _weights_version(chat: Any) -> Any:
    """A callback that stamps the rollouts with the weights that made them."""
    from transformers import TrainerCallback

    class WeightsVersion(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            chat.weights_version = f"step-{state.global_step}"

    return WeightsVersion()
