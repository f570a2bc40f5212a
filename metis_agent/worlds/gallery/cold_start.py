"""The recipe of the gallery's cold start: a tiny Qwen3-VL that reads, points, crops and searches, and far too often.

Supervised from nothing on pictures that the world draws (`make gallery`). First the eyes alone (see `tokens`): digits
and words, then charts as well. Then the eyes stay as they are, and the language model learns in three stages: *look*
(read large text, read a crop, point at the cell of tiny text), *act* (whole trajectories, nearly all with a call,
beside direct answers with the decision left out of the loss, which keep the reading), *polish* (the same at half the
rate).

What it needs: Muon on the matrices, AdamW on embeddings, norms and the patch convolution; a start in which positions
and patches are loud; and many pictures: a thousand are learnt by heart before a digit is told from another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.worlds import TRAINED_ON_TOOLS
from metis_agent.worlds.gallery.pictures import CONTENTS, VIEW, Content
from metis_agent.worlds.gallery.rows import IGNORE, Lesson, Rows
from metis_agent.worlds.gallery.tokens import MERGE, PATCH, SightHead, build_processor

__all__ = ["Recipe", "SightStage", "Stage", "build_model", "train_cold_start", "train_language", "train_sight"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: how many rows of each lesson make a batch, and the rate from its start to its end."""

    steps: int
    lessons: Sequence[tuple[Lesson, int]]
    rates: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class SightStage:
    """A part of the training of the eyes: pictures of each content (see `Rows.pictures`), and the rate."""

    steps: int
    pictures: Sequence[tuple[Content, int]]
    rates: tuple[float, float]


_LOOKING: tuple[tuple[Lesson, int], ...] = (
    (("read", "number", "large"), 8), (("read", "word", "large"), 6), (("read", "chart", "large"), 8),
    (("read_crop", "number", "tiny"), 6), (("read_crop", "word", "tiny"), 5), (("read_crop", "chart", "tiny"), 6),
    (("point", "number", "tiny"), 4), (("point", "word", "tiny"), 4), (("point", "chart", "tiny"), 4),
)  # fmt: skip
_ACTING: tuple[tuple[Lesson, int], ...] = (
    (("act", "number", "large"), 5), (("act", "word", "large"), 4), (("act", "chart", "large"), 5),
    (("act", "number", "tiny"), 5), (("act", "word", "tiny"), 4), (("act", "chart", "tiny"), 5),
    (("read", "number", "large"), 5), (("read", "word", "large"), 4), (("read", "chart", "large"), 6),
    (("read_crop", "number", "tiny"), 3), (("read_crop", "word", "tiny"), 3), (("read_crop", "chart", "tiny"), 4),
    ("painting", 8),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the cold start depends on."""

    sight: tuple[SightStage, ...] = (
        SightStage(steps=2000, pictures=(("number", 12), ("word", 12)), rates=(0.6, 0.1)),
        SightStage(steps=2500, pictures=(("number", 8), ("word", 8), ("chart", 14)), rates=(0.6, 0.01)),
    )
    """Of the vision tower alone, before everything else."""
    stages: tuple[Stage, ...] = (
        Stage(steps=500, lessons=_LOOKING, rates=(1.0, 1.0)),
        Stage(steps=600, lessons=_ACTING, rates=(1.0, 0.1)),
        Stage(steps=400, lessons=_ACTING, rates=(0.5, 0.0)),
    )
    seed: int = 0
    muon_lr: float = 0.03
    muon_decay: float = 0.01
    """Of the language model's matrices. Without it they grow, and what HDPO's steps change of them shrinks."""
    adamw_lr: float = 3e-3
    warmup: int = 20
    direct_large: float = 0.04
    """Share of whole trajectories that answer directly where the text is large; elsewhere `direct_tiny`."""
    direct_tiny: float = 0.002
    pool: int = 200
    """Pictures of each kind to draw from; of all of them, `fresh` are drawn anew each step."""
    fresh: int = 20

    @property
    def steps(self) -> int:
        """Of everything."""
        return sum(stage.steps for stage in self.sight) + sum(stage.steps for stage in self.stages)


def build_model(processor: StillsProcessor) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of 0.6M parameters, freshly initialised from torch's global seed."""
    tokenizer: Any = processor.tokenizer
    vision_tokens = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in vision_tokens}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 192, "depth": 2, "num_heads": 4, "out_hidden_size": 128,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
        "num_position_embeddings": (VIEW // PATCH) ** 2, "deepstack_visual_indexes": [],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=True,
        **TRAINED_ON_TOOLS,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        visual: Any = model.model.visual
        visual.pos_embed.weight.normal_(0.0, 1.0)
        visual.patch_embed.proj.weight.normal_(0.0, 0.08)
        words: Any = model.get_input_embeddings()
        words.weight.normal_(0.0, 0.3)
    return model


def train_cold_start(
    folder: Path,
    recipe: Recipe = Recipe(),
    *,
    progress: Callable[[int, float, Qwen3VLForConditionalGeneration], None] = lambda step, loss, model: None,
) -> Path:
    """Train the cold start and save it with its processor to `folder`; `progress` gets step, loss and model."""
    torch.manual_seed(recipe.seed)
    processor = build_processor()
    model = build_model(processor)
    step = count(1)
    train_sight(model, processor, recipe, lambda loss: progress(next(step), loss, model))
    train_language(model, processor, recipe, lambda loss: progress(next(step), loss, model))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train_sight(
    model: Qwen3VLForConditionalGeneration,
    processor: StillsProcessor,
    recipe: Recipe,
    progress: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train the vision tower alone; `progress` gets each step's loss."""
    tower: Any = model.model.visual
    head = SightHead(tower.config.out_hidden_size)
    both = nn.ModuleDict({"tower": tower, "embedded": head})
    optimizers = _optimizers(both, recipe, decay=0.0)
    both.train()
    for place, stage in enumerate(recipe.sight):
        rows = _rows(processor, recipe, f"sight {place}", [content for content, _ in stage.pictures])
        for rate in _rates(stage, recipe.warmup if place == 0 else 0):
            _set_rate(optimizers, rate)
            loss = head.loss(tower, *rows.pictures(stage.pictures))[0]
            loss.backward()  # type: ignore[no-untyped-call]
            _update(both, optimizers)
            progress(loss.item())
    both.train(False)


def train_language(
    model: Qwen3VLForConditionalGeneration,
    processor: StillsProcessor,
    recipe: Recipe,
    progress: Callable[[float], None] = lambda loss: None,
) -> None:
    """Train the language model behind eyes that stay as they are; `progress` gets each step's loss.

    What the eyes tell is enough, and a step costs a third less.
    """
    model.model.visual.requires_grad_(False)
    rows = _rows(processor, recipe, "language", CONTENTS)
    optimizers = _optimizers(model, recipe, decay=recipe.muon_decay)
    model.train()
    for place, stage in enumerate(recipe.stages):
        for rate in _rates(stage, recipe.warmup if place == 0 else 0):
            _set_rate(optimizers, rate)
            batches = rows.batches(stage.lessons)
            examples = sum(len(batch["labels"]) for batch in batches)
            loss = 0.0
            for batch in batches:
                part = _loss(model, batch) / (_TOKENS * examples)
                part.backward()  # type: ignore[no-untyped-call]
                loss += part.item()
            _update(model, optimizers)
            progress(loss)
    model.train(False)


def _rows(processor: StillsProcessor, recipe: Recipe, name: str, contents: Sequence[Content]) -> Rows:
    """Rows of a part of the training, which does not depend on how many the part before has drawn."""
    return Rows(
        processor, random.Random(f"{name} {recipe.seed}"), pool=recipe.pool, fresh=recipe.fresh,
        direct_large=recipe.direct_large, direct_tiny=recipe.direct_tiny, contents=contents,
    )  # fmt: skip


def _rates(stage: Stage | SightStage, warmup: int) -> list[float]:
    """The rate of each step: from the first to the last, after a warm-up."""
    first, last = stage.rates
    rates = [first + (last - first) * step / stage.steps for step in range(stage.steps)]
    return [min(rate, (step + 1) / warmup) if step < warmup else rate for step, rate in enumerate(rates)]


def _optimizers(model: nn.Module, recipe: Recipe, *, decay: float) -> tuple[torch.optim.Optimizer, ...]:
    """Muon on the matrices, AdamW on the rest; nothing else learns to see."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in trained if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon([{"params": matrices, "full": recipe.muon_lr}], momentum=0.9, weight_decay=decay),
        torch.optim.AdamW([{"params": others, "full": recipe.adamw_lr}], betas=(0.9, 0.98), weight_decay=0.0),
    )


def _set_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate


def _update(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


_TOKENS = 4
"""By so many a row the loss is divided, whatever its length: a mean per batch would overweight short answers."""


def _loss(model: Qwen3VLForConditionalGeneration, batch: Mapping[str, Tensor]) -> Tensor:
    """Summed cross-entropy."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def _main() -> None:
    """`make gallery`: train the cold start that the package ships."""
    from rich.progress import Progress, TextColumn

    from metis_agent.worlds.gallery.experiment import COLD_START

    recipe = Recipe()
    torch.set_num_threads(1)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as bars:
        task = bars.add_task("cold start", total=recipe.steps, loss=float("nan"))
        train_cold_start(
            COLD_START, recipe, progress=lambda step, loss, _: bars.update(task, completed=step, loss=loss)
        )


if __name__ == "__main__":
    _main()
