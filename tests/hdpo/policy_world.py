"""A tiny policy in the almanac, its rollouts and its trainer: what the tests of policy training share."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from langchain_core.tools import tool
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl import GRPOConfig

from metis_agent.agent import create_metis_agent
from metis_agent.hdpo.config import HDPOConfig
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollout, Rollouts
from metis_agent.rules.budget import Budget
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.almanac.cold_start import CHAT_TEMPLATE, build_model, build_tokenizer
from metis_agent.worlds.almanac.experiment import COLD_START
from metis_agent.worlds.almanac.questions import questions

TOKENIZER = build_tokenizer()
LESSONS = questions("train", 8, kinds=("sum",))
FREE = StratifiedGroups(size=4, direct=0, tool=0)
STRATIFIED = StratifiedGroups(size=4, direct=1, tool=1)


@tool
def python(code: str) -> str:
    """Give the code back."""
    return code[:8]


def fresh_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return build_model(len(TOKENIZER), end=TOKENIZER.eos_token_id, pad=TOKENIZER.pad_token_id)


def cold_start() -> Qwen3ForCausalLM:
    return LocalChatModel.load(COLD_START).model


def rewriting_tokenizer() -> PreTrainedTokenizerFast:
    """One whose template is not append-only: once there is a reply, the question reads otherwise."""
    tokenizer = build_tokenizer()
    rewritten = "{%- else -%}{{- message.content -}}{%- if messages|length > 1 -%}.{%- endif -%}{%- endif -%}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{%- else -%}{{- message.content -}}{%- endif -%}", rewritten)
    assert tokenizer.chat_template != CHAT_TEMPLATE
    return tokenizer


def coin(question: Question, answer: str) -> bool:
    """A verdict that any model's answers split on, an untrained one's, too."""
    return zlib.crc32(answer.encode()) % 2 == 0


def trl_settings(folder: Path, groups: StratifiedGroups = FREE) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "num_generations": groups.size, "per_device_train_batch_size": 2 * groups.size,
        "steps_per_generation": 1, "max_steps": 2, "learning_rate": 0.05, "beta": 0.0, "loss_type": "dapo",
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "bf16": False, "activation_checkpointing": False, "shuffle_dataset": False, "temperature": 1.0,
        "max_completion_length": 64, "dataloader_pin_memory": False, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "optim": "sgd",  # Adam would turn the rounding of a gradient near zero into a whole step
        "lr_scheduler_type": "constant",
    }  # fmt: skip


def arguments(folder: Path, groups: StratifiedGroups = FREE, **changed: Any) -> HDPOConfig:
    own = {"forced_direct": groups.direct, "forced_tool": groups.tool}
    return HDPOConfig(**{**trl_settings(folder, groups), **own, **changed})


class Noted(Rollouts):
    """Rollouts that remember what they returned, so that another trainer can be given the same."""

    batches: list[list[Trajectory]]

    def collect(self, rollouts: Sequence[Rollout], **options: Any) -> list[Trajectory]:
        found = super().collect(rollouts, **options)
        self.batches = [*getattr(self, "batches", []), found]
        return found


def rollouts_of(
    model: Any, folder: Path, tokenizer: Any = TOKENIZER, tools: Sequence[Any] = (python,), *, calls: int = 1,
    **options: Any,
) -> Noted:  # fmt: skip
    chat = LocalChatModel(model=model, tokenizer=tokenizer, temperature=1.0, max_new_tokens=12)
    return Noted(
        lambda gate: create_metis_agent(
            chat, list(tools), gate=gate, budget=Budget(calls=calls), tool_timeout=options.get("timeout")
        ),
        TrajectoryStore(folder / "trajectories"),
        **options,
    )


def trainer_of(
    folder: Path,
    args: GRPOConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = TOKENIZER,
    rollouts: Rollouts | None = None,
    **options: Any,
) -> HDPOTrainer:
    model = model or cold_start()
    return HDPOTrainer(
        model, tokenizer, args or arguments(folder), questions=options.pop("questions", LESSONS),
        rollouts=rollouts or rollouts_of(model, folder, tokenizer), verify=options.pop("verify", coin), **options,
    )  # fmt: skip


def logged(trainer: HDPOTrainer, name: str) -> list[float]:
    """A metric's values, one a step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def furthest(one: Any, other: Any) -> float:
    """The largest difference between the weights of two models."""
    theirs = dict(other.named_parameters())
    return max(float((p.detach() - theirs[name].detach()).abs().max()) for name, p in one.named_parameters())
