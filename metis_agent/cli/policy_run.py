"""The file that `metis train policy` reads: one training run of a policy, in full.

Its parts are below, every key checked before any work starts (`policy_file` reads it). What a key is for stands in the
packaged files (`metis_agent/hdpo/configs`), which are the documentation: copy one and change it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError

__all__ = ["PolicyRun", "check_reporters", "processes", "read_questions_of"]

_Count = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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


class Objective(_Part):
    """Which advantages, and what a call costs."""

    name: Literal["hdpo", "grpo", "coupled", "gdpo"] = "hdpo"
    w_acc: _Weight = 1.0
    w_tool: _Weight = 0.15
    alpha: _Weight = 0.15
    branch_weight: bool = False
    margin: _Weight = 0.1


class Groups(_Part):
    """How the rollouts of a question start."""

    size: int = Field(default=16, ge=2)
    direct: int = Field(default=4, ge=0)
    tool: int = Field(default=4, ge=0)


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
    objective: Objective = Objective()
    groups: Groups = Groups()
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
