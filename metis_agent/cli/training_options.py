"""Options that say what reads the questions of a gate, and the policy that they make."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from metis_agent.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.hdpo.policies.base import Policy

__all__ = [
    "BatchSizeOption",
    "DeviceOption",
    "EpochsOption",
    "LearningRateOption",
    "LoraOption",
    "ModelOption",
    "PolicyChoice",
    "PolicyOption",
    "forget_training",
]

_PACKAGED = ("features", "encoder", "decision_lm")
_PANEL = "What reads the questions"
PolicyOption = Annotated[
    str,
    typer.Option(
        help="'features': n-grams and numbers, no download, seconds. 'encoder': a sequence classifier, from some "
        "thousand rows on. 'decision_lm': a chat model, which knows tools by their descriptions (--describe). Or "
        "FILE.py:ATTRIBUTE for a kind of your own.",
        rich_help_panel=_PANEL,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_FOLDER",
        help="For 'encoder' and 'decision_lm': a folder that save_pretrained wrote, or a name on the Hub.",
        rich_help_panel=_PANEL,
    ),
]
LoraOption = Annotated[
    bool,
    typer.Option(
        "--lora", help="For 'decision_lm': train low-rank adapters, merged at the end.", rich_help_panel=_PANEL
    ),
]
EpochsOption = Annotated[
    int | None, typer.Option(min=1, help="At most; held-out loss stops it earlier.", rich_help_panel=_PANEL)
]
BatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Questions a step.", rich_help_panel=_PANEL)]
LearningRateOption = Annotated[
    float | None,
    typer.Option(help="Default: 3e-5 for 'encoder', 1e-5 for 'decision_lm', 1e-4 with --lora.", rich_help_panel=_PANEL),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="Such as cpu or cuda:1; by default the accelerator, if any.", rich_help_panel=_PANEL),
]


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """The options, as given.

    Raises:
        ConfigurationError: they don't go together.
    """

    policy: str
    model: str | None
    lora: bool
    epochs: int | None
    batch_size: int | None
    learning_rate: float | None
    device: str | None

    def __post_init__(self) -> None:
        if self.policy not in _PACKAGED and ":" not in self.policy:
            raise ConfigurationError(
                f"--policy {self.policy!r} is none of {', '.join(_PACKAGED)}; or name a policy of your own, "
                "FILE.py:ATTRIBUTE."
            )
        given = {name for name in ("model", "epochs", "batch_size", "learning_rate", "device") if getattr(self, name)}
        if self.policy not in _PACKAGED[1:] and (given or self.lora):
            names = sorted(f"--{name.replace('_', '-')}" for name in given | ({"lora"} if self.lora else set()))
            raise ConfigurationError(
                f"{', '.join(names)} with --policy {self.policy!r}, which has no model: add --policy encoder or "
                "--policy decision_lm."
            )
        if self.policy in _PACKAGED[1:] and not self.model:
            example = "answerdotai/ModernBERT-base" if self.policy == "encoder" else "Qwen/Qwen3-0.6B"
            raise ConfigurationError(
                f"--policy {self.policy!r} needs --model: a folder that save_pretrained wrote, or a name on the Hub "
                f"such as {example!r}. Without one, use --policy features."
            )
        if self.lora and self.policy != "decision_lm":
            raise ConfigurationError(f"--lora with --policy {self.policy!r}: adapters are for --policy decision_lm.")

    def build(self, bars: Progress, out: Path, rows: int, descriptions: Mapping[str, str], seed: int) -> Policy:
        """The policy; it shows its progress, and keeps the state of a long training beside `out`.

        Raises:
            ConfigurationError: the model's folder is not there.
            MissingDependencyError: an extra is not installed.
        """
        if self.policy == "features":
            from metis_agent.hdpo.policies.features import FeaturesPolicy

            read = bars.add_task("read the questions", total=rows)
            return FeaturesPolicy(progress=lambda count: bars.advance(read, count))
        if self.policy not in _PACKAGED:
            from metis_agent.cli.agent_options import load_attribute

            found = load_attribute(self.policy)
            own: Policy = found() if isinstance(found, type) else found
            return own
        task = bars.add_task("train", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total)

        try:
            return self._torch_policy(progress, _state_folder(out), descriptions, seed)
        except ModuleNotFoundError as missing:
            raise MissingDependencyError(
                f"--policy {self.policy!r} needs {missing.name!r}; "
                "install it with: pip install 'langgraph-metis[train]'"
            ) from missing

    def _torch_policy(self, progress: Any, state: Path, descriptions: Mapping[str, str], seed: int) -> Policy:
        from metis_agent.hdpo.policies.decision_lm import DecisionLMPolicy, Lora
        from metis_agent.hdpo.policies.encoder import EncoderPolicy
        from metis_agent.hdpo.policies.gradient import GradientTraining

        rates = {"encoder": 3e-5, "decision_lm": 1e-4 if self.lora else 1e-5}
        training = GradientTraining(
            epochs=self.epochs or (10 if self.policy == "encoder" else 5),
            batch_size=self.batch_size or 16,
            learning_rate=rates[self.policy] if self.learning_rate is None else self.learning_rate,
            seed=seed,
            resume=state,
        )
        model = str(self.model)
        if self.policy == "encoder":
            return EncoderPolicy(model=model, training=training, device=self.device, progress=progress)
        return DecisionLMPolicy(
            model=model,
            descriptions=descriptions,
            lora=Lora() if self.lora else None,
            training=training,
            device=self.device,
            progress=progress,
        )


def forget_training(out: Path) -> None:
    """Delete the state of a training whose gate is written."""
    shutil.rmtree(_state_folder(out), ignore_errors=True)


def _state_folder(out: Path) -> Path:
    return out.parent / f"{out.name}.training"
