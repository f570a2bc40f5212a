"""What `metis train policy` reads: one training run of a policy, in full, and the trainer that is built from it.

Every key is checked before any work starts. What a key is for stands in the packaged files
(`metis_agent/hdpo/configs`), which are the documentation: copy one and change it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from metis_agent.cli.curate_parts import open_tools
from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups

if TYPE_CHECKING:
    from metis_agent.agent import MetisAgent
    from metis_agent.gates.base import Gate
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.types import Question

__all__ = [
    "PolicyRun",
    "agent_of_run",
    "build_trainer",
    "check_reporters",
    "model_folder",
    "processes",
    "read_questions_of",
    "tools_of_run",
    "verify_of_run",
]


def build_trainer(
    run: PolicyRun,
    loaded: Any,
    out: Path,
    *,
    callbacks: Sequence[Any],
    questions: Sequence[Question] | None = None,
) -> HDPOTrainer:
    """The trainer of a run.

    Args:
        run: The file.
        loaded: The model, its tokenizer, and the processor of one that sees.
        out: Where everything goes.
        callbacks: What shows the progress.
        questions: To learn from, instead of the file's.

    Raises:
        ConfigurationError: A setting does not fit.
    """
    from transformers import PrinterCallback

    from metis_agent.evaluation.agents import Probes
    from metis_agent.hdpo.config import Validation
    from metis_agent.hdpo.policy_trainer import HDPOTrainer
    from metis_agent.recording.store import TrajectoryStore
    from metis_agent.rollouts.runner import Rollouts

    tools = tools_of_run(run)
    # FSDP 2 leaves no process a whole model: the agent then samples from a second copy.
    sampler = _second_copy(run) if _spread_by_fsdp() and run.sampling.backend == "local" else None
    # The direct branch is trained with the tools in its prompt, and so it is to be asked.
    from metis_agent.models.local import OFFERS_TOOLS_WHEN_DIRECT

    setattr(loaded.model.config, OFFERS_TOOLS_WHEN_DIRECT, True)
    chat = _chat(run, loaded, run.sampling.temperature, sampler)
    options: dict[str, Any] = {"concurrency": run.sampling.concurrency, "timeout": run.sampling.timeout}
    validation = None
    if run.questions.validation is not None:
        measured = _chat(run, loaded, run.validation.temperature, sampler)
        validation = Validation(
            questions=read_questions_of(run.questions.validation),
            rollouts=Rollouts(
                agent_of_run(run, measured, tools), TrajectoryStore(out / "trajectories" / "validation"), **options
            ),
            every=run.validation.every * run.training.updates_per_step,
            probes=Probes(direct=run.validation.direct, tool=run.validation.tool),
        )
    trainer = HDPOTrainer(
        loaded.model,
        loaded.tokenizer,
        _arguments(run, out),
        questions=read_questions_of(run.questions.train) if questions is None else questions,
        rollouts=Rollouts(agent_of_run(run, chat, tools), TrajectoryStore(out / "trajectories" / "train"), **options),
        verify=verify_of_run(run, out),
        validation=validation,
        images=_reader(loaded),
        sampler=sampler,
        callbacks=[*callbacks, _weights_version(chat)],
        peft_config=_lora(run),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tools_of_run(run: PolicyRun) -> list[Any]:
    """The tools of a run's agent.

    Raises:
        ConfigurationError, SandboxUnavailableError: As `open_tools`.
    """
    agent = run.agent
    sessions = min(run.sampling.concurrency, 32)
    return open_tools(
        agent.tools, python=agent.python, corpus=Path(agent.corpus) if agent.corpus else None, sessions=sessions
    )[0]


def _arguments(run: PolicyRun, out: Path) -> Any:
    import torch

    from metis_agent.hdpo.config import HDPOConfig

    training, sampling, objective = run.training, run.sampling, asdict(run.objective)
    generation, accumulated = run.batches(processes())
    settings: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"), "num_generations": run.groups.size, "seed": training.seed,
        "forced_direct": run.groups.direct, "forced_tool": run.groups.tool, "forced_steps": run.groups.steps,
        "objective": objective.pop("name"), **objective,
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
            max_tokens=sampling.max_new_tokens, offers_tools_when_direct=True,
        )  # fmt: skip
    return LocalChatModel(
        model=sampler or loaded.model, tokenizer=loaded.tokenizer, processor=loaded.processor,
        model_name=run.model.path, temperature=temperature, max_new_tokens=sampling.max_new_tokens,
        offers_tools_when_direct=True,
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


def agent_of_run(run: PolicyRun, chat: Any, tools: list[Any]) -> Callable[[Gate], MetisAgent]:
    """The agent of a run, around a gate."""
    from metis_agent.agent import create_metis_agent
    from metis_agent.rules.budget import Budget

    agent = run.agent
    message: dict[str, Any] = {} if agent.block_message is None else {"block_message": agent.block_message}
    return lambda gate: create_metis_agent(
        chat, tools, gate=gate, budget=Budget(calls=agent.calls), system_prompt=agent.system_prompt,
        tool_timeout=agent.tool_timeout, **message,
    )  # fmt: skip


def verify_of_run(run: PolicyRun, out: Path) -> Any:
    """What judges the answers of a run."""
    from metis_agent.judging.judge import Agreeing, AgreementJudge, AnswerJudge, own_answers
    from metis_agent.judging.verifiers import VERIFIERS, Verify, verify
    from metis_agent.sqlite import DiskCache

    by_reference: Verify = verify
    if run.judge is not None:
        judge = AnswerJudge(run.judge, cache=DiskCache(out / "judge"))
        by_reference = partial(verify, verifiers={**VERIFIERS, "judge": judge})
    if run.agreement is None:
        return by_reference
    from metis_agent.recording.store import TrajectoryStore

    own = own_answers(TrajectoryStore(run.agreement, read_only=True).read(whole=False))
    pairs = None if run.judge is None else AgreementJudge(run.judge, cache=DiskCache(out / "agreement"))
    return Agreeing(own, verify=by_reference, pair_judge=pairs)


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


_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Call(_Part):
    """A Python function and what to call it with."""

    function: str
    arguments: dict[str, Any] = {}


class Lora(_Part):
    """Train low-rank adapters instead of all weights."""

    rank: _Count = 16
    alpha: _Count = 32
    dropout: _Share = 0.0
    targets: str | list[str] = "all-linear"


class Model(_Part):
    """What is trained."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora: Lora | None = None


class Agent(_Part):
    """The graph that makes the rollouts, the same that serves users."""

    tools: list[str] = []
    python: bool = False
    corpus: str | None = None
    calls: _Count = 9
    system_prompt: str | None = None
    block_message: str | None = None
    tool_timeout: float | None = Field(default=60.0, gt=0)


class Sampling(_Part):
    """How rollouts are sampled."""

    backend: Literal["local", "vllm"] = "local"
    url: str = "http://127.0.0.1:8000"
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: _Count = 512
    concurrency: _Count = 256
    timeout: float | None = Field(default=600.0, gt=0)


class Questions(_Part):
    """What is asked."""

    train: str | Call
    validation: str | Call | None = None
    shuffle: bool = True


class Validation(_Part):
    """When and how the agent is measured on the validation questions."""

    every: _Count = 10
    temperature: float = Field(default=0.0, ge=0)
    direct: _Count = 4
    tool: _Count = 1


class Training(_Part):
    """Steps, batches and the optimiser."""

    steps: _Count
    questions_per_step: _Count = 128
    updates_per_step: _Count = 1
    micro_batch: _Count = 1
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.2, ge=0)
    beta: float = Field(default=0.0, ge=0)
    loss_type: Literal["dapo", "grpo", "bnpo"] = "dapo"
    max_length: int | None = Field(default=None, ge=2)
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    checkpoint_every: _Count = 10
    keep_checkpoints: _Count = 2
    seed: int = 0
    trl: dict[str, Any] = {}


class PolicyRun(_Part):
    """A training run."""

    output: str
    model: Model
    agent: Agent = Agent()
    sampling: Sampling = Sampling()
    questions: Questions
    validation: Validation = Validation()
    judge: str | None = None
    agreement: str | None = None
    """A store of recorded runs: what they answered freely stands for the answers that questions lack."""
    objective: Objective = Objective()
    groups: StratifiedGroups = StratifiedGroups()
    training: Training
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] | list[str] = "none"

    def batches(self, processes: int) -> tuple[int, int]:
        """Micro-batches of a process in one set of rollouts, and in one update.

        Raises:
            ConfigurationError: the rollouts of a step don't divide into them.
        """
        training, group = self.training, self.groups.size
        if training.questions_per_step % processes:
            raise ConfigurationError(
                f"training.questions_per_step is {training.questions_per_step!r} and there are {processes} processes: "
                "a group is never spread over processes, so it must be a multiple. Change it, or --num_processes."
            )
        rollouts = training.questions_per_step // processes * group
        per_update = training.micro_batch * training.updates_per_step
        if rollouts % per_update:
            raise ConfigurationError(
                f"training.micro_batch is {training.micro_batch!r} and training.updates_per_step "
                f"{training.updates_per_step!r}, but a process has {rollouts} rollouts a step (questions_per_step / "
                f"processes * groups.size): their product must divide that, such as micro_batch: {_fitting(rollouts)}."
            )
        return rollouts // training.micro_batch, rollouts // per_update


def read_questions_of(source: str | Call) -> list[Any]:
    """The questions of a file, or of a function that returns them.

    Raises:
        ConfigurationError, InputError: there are none, or they are something else.
    """
    from metis_agent.cli.agent_options import load_attribute
    from metis_agent.rollouts.questions import read_questions
    from metis_agent.types import Question

    if isinstance(source, str):
        return list(read_questions(source))
    made = load_attribute(source.function)(**source.arguments)
    if not made or not all(isinstance(question, Question) for question in made):
        raise InputError(f"{source.function!r} returned {made!r:.200}; it must return Questions, at least one.")
    return list(made)


def check_reporters(wanted: str | Sequence[str]) -> list[str]:
    """The trackers to report to.

    Raises:
        ConfigurationError, MissingDependencyError: one is unknown, or not installed.
    """
    from importlib.util import find_spec

    names = [wanted] if isinstance(wanted, str) else list(wanted)
    packages = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    for name in names:
        if name not in packages:
            raise ConfigurationError(f"report_to is {name!r}; choose of {sorted(packages)!r}.")
        package = packages[name]
        if package and find_spec(package) is None:
            raise MissingDependencyError(f"report_to: {name} needs its package; install it with: pip install {package}")
    return names


def processes() -> int:
    """How many processes `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fitting(rollouts: int) -> int:
    return next(size for size in range(min(rollouts, 16), 0, -1) if rollouts % size == 0)
