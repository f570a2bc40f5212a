"""Cold start: supervised fine-tuning on curated trajectories, with TRL's SFTTrainer.

Stands between curation and HDPO: it teaches a base model the tool habit and the format that RL then prices. What
carries loss is decided in `sft_rows`.

Source: arXiv:2604.08545, the SFT stage.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.config import last_checkpoint
from metis_agent.hdpo.sft_rows import IGNORED, SftData, SftRow, sft_rows, write_sft_data

__all__ = ["IGNORED", "SftData", "SftRow", "SftSettings", "sft_rows", "train_sft", "write_sft_data"]


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """How to fine-tune; the defaults are for a model of billions of parameters."""

    epochs: float = 2.0
    max_steps: int = -1
    """Where 1 or more, it ends the run, whatever `epochs` says."""
    learning_rate: float = 1e-5
    batch: int = 8
    """Rows a device and step."""
    accumulation: int = 1
    """Such steps in one update."""
    warmup: float = 0.03
    """Share of the updates."""
    max_length: int | None = 8_192
    seed: int = 0
    lora_rank: int = 0
    """0 trains all weights."""
    checkpoint_every: int = 200
    """Updates; what a killed run loses at most."""
    activation_checkpointing: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of TRL's SFTConfig."""

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch", "accumulation", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"SftSettings({name}={getattr(self, name)!r}): it must be more than 0.")
        if not 0 <= self.warmup < 1 or self.lora_rank < 0:
            raise ConfigurationError(f"{self!r}: warmup is a share below 1, lora_rank 0 or more.")


def train_sft(
    model: Any,
    tokenizer: Any,
    data: SftData | Path,
    out: Path,
    settings: SftSettings = SftSettings(),
    *,
    callbacks: Sequence[Any] = (),
    optimizers: tuple[Any, Any] = (None, None),
) -> list[Mapping[str, float]]:
    """Fine-tune, or go on from the last checkpoint; model and tokenizer are saved to `out`.

    Args:
        model: a causal language model; trained in place.
        tokenizer: its tokenizer.
        data: what `write_sft_data` wrote.
        out: the folder; checkpoints are in `out/checkpoints`.
        settings: how.
        callbacks: further transformers callbacks.
        optimizers: another optimizer and schedule than AdamW with a linear decay.

    Returns:
        The log: loss, learning rate and so on by step.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    rows = Dataset.from_file(str(data.path if isinstance(data, SftData) else data))
    trainer = SFTTrainer(
        model=model, args=_arguments(out, settings), train_dataset=rows, processing_class=tokenizer,
        peft_config=_lora(settings), callbacks=list(callbacks), optimizers=optimizers,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    stopped = last_checkpoint(out / "checkpoints")
    with warnings.catch_warnings():
        # Attention layers of some models are not deterministic on some devices, which torch says at each step.
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.checkpoint")
        trainer.train(resume_from_checkpoint=str(stopped) if stopped else None)
    trainer.save_model(str(out))
    tokenizer.save_pretrained(out)
    return [dict(entry) for entry in trainer.state.log_history]


def _arguments(out: Path, settings: SftSettings) -> Any:
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "warmup_steps": settings.warmup,  # a share where below 1
        "seed": settings.seed,
        # What is too long was left out when the data was written; here nothing is cut.
        "max_length": None,
        "packing": False,
        "logging_steps": 1,
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": cuda,
        "activation_checkpointing": settings.activation_checkpointing,
        "dataloader_pin_memory": cuda,
    }
    return SFTConfig(**{**fields, **settings.extra})


def _lora(settings: SftSettings) -> Any:
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
