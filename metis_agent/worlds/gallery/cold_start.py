"""The recipe of the gallery's cold start: a tiny Qwen3-VL that reads, points, crops and searches, and far too often.

Supervised from nothing on pictures that the world draws (`make gallery`). First the eyes alone (see `sight`), which
then stay as they are. Then the language model, in three stages: *look* (read large text, read a crop, point at the cell
of tiny text), *act* (whole trajectories, nearly all with a call, beside direct answers with the decision left out of
the loss, which keep the reading), *polish* (the same at half the rate).

What it needs: Muon on the matrices, AdamW on embeddings, norms and the patch convolution; a start in which positions
and patches are loud; and many pictures: a thousand are learnt by heart before a digit is told from another.

The weights that the package ships went through these stages in several sittings, with changes between them, so that a
run of this recipe gives others. Charts are drawn and can be asked about, but they are not taught.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_agent.models.stills import StillsProcessor
from metis_agent.worlds.gallery.exhibits import Content
from metis_agent.worlds.gallery.pictures import VIEW
from metis_agent.worlds.gallery.rows import IGNORE, Lesson, Rows
from metis_agent.worlds.gallery.sight import SightHead
from metis_agent.worlds.gallery.tokens import MERGE, PATCH, build_processor

__all__ = ["Recipe", "Stage", "build_model", "train_cold_start"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: how many rows of each lesson make a batch, and the rate from its start to its end."""

    steps: int
    lessons: Sequence[tuple[Lesson, int]]
    rates: tuple[float, float]


_LOOKING: tuple[tuple[Lesson, int], ...] = (
    (("read", "number", "large"), 10), (("read", "word", "large"), 7),
    (("read_crop", "number", "tiny"), 8), (("read_crop", "word", "tiny"), 6),
    (("point", "number", "tiny"), 5), (("point", "word", "tiny"), 5),
)  # fmt: skip
_ACTING: tuple[tuple[Lesson, int], ...] = (
    (("act", "number", "large"), 5), (("act", "word", "large"), 5),
    (("act", "number", "tiny"), 6), (("act", "word", "tiny"), 5),
    (("read", "number", "large"), 6), (("read", "word", "large"), 5),
    (("read_crop", "number", "tiny"), 4), (("read_crop", "word", "tiny"), 3),
    ("painting", 6),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the cold start depends on."""

    stages: tuple[Stage, ...] = (
        Stage(steps=250, lessons=_LOOKING, rates=(1.0, 1.0)),
        Stage(steps=350, lessons=_ACTING, rates=(1.0, 0.1)),
        Stage(steps=250, lessons=_ACTING, rates=(0.5, 0.0)),
    )
    seed: int = 0
    muon_lr: float = 0.03
    adamw_lr: float = 3e-3
    warmup: int = 20
    direct_large: float = 0.04
    """Share of whole trajectories that answer directly where the text is large; elsewhere `direct_tiny`."""
    direct_tiny: float = 0.002
    sight_steps: int = 2000
    """Of the vision tower alone, before everything else."""
    sight_rates: tuple[float, float] = (0.6, 0.01)
    sight_pictures: tuple[tuple[Content, int], ...] = (("number", 12), ("word", 12))
    pool: int = 200
    """Pictures of each kind to draw from; of all of them, `fresh` are drawn anew each step."""
    fresh: int = 20

    @property
    def steps(self) -> int:
        """Of everything."""
        return self.sight_steps + sum(stage.steps for stage in self.stages)


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
    rows = Rows(
        processor, random.Random(recipe.seed), pool=recipe.pool, fresh=recipe.fresh,
        direct_large=recipe.direct_large, direct_tiny=recipe.direct_tiny,
        contents=[content for content, _ in recipe.sight_pictures],
    )  # fmt: skip
    _train_sight(model, rows, recipe, lambda step, right: progress(step, right, model))
    # From here on the eyes stay as they are: what they tell is enough, and a step costs a third less.
    model.model.visual.requires_grad_(False)
    optimizers = _optimizers(model, recipe)
    model.train()
    for step, (stage, rate) in enumerate(_schedule(recipe)):
        _set_rate(optimizers, rate)
        batches = rows.batches(stage.lessons)
        count = sum(len(batch["labels"]) for batch in batches)
        loss = 0.0
        for batch in batches:
            part = _loss(model, batch) / (_TOKENS * count)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        _update(model, optimizers)
        progress(recipe.sight_steps + step + 1, loss, model)
    model.train(False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train_sight(
    model: Qwen3VLForConditionalGeneration, rows: Rows, recipe: Recipe, progress: Callable[[int, float], None]
) -> None:
    tower: Any = model.model.visual
    head = SightHead(tower.config.out_hidden_size)
    both = nn.ModuleDict({"tower": tower, "embedded": head})
    optimizers = _optimizers(both, recipe)
    both.train()
    for step in range(recipe.sight_steps):
        first, last = recipe.sight_rates
        _set_rate(optimizers, min((step + 1) / recipe.warmup, first + (last - first) * step / recipe.sight_steps))
        loss, _ = head.loss(tower, *rows.pictures(recipe.sight_pictures))
        loss.backward()  # type: ignore[no-untyped-call]
        _update(both, optimizers)
        progress(step + 1, loss.item())


def _optimizers(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon on the matrices, AdamW on the rest; nothing else learns to see."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in trained if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon([{"params": matrices, "full": recipe.muon_lr}], momentum=0.9, weight_decay=0.0),
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


def _schedule(recipe: Recipe) -> list[tuple[Stage, float]]:
    """Stage and rate of each step."""
    steps: list[tuple[Stage, float]] = []
    for stage in recipe.stages:
        first, last = stage.rates
        steps += [(stage, first + (last - first) * step / stage.steps) for step in range(stage.steps)]
    return [(stage, min(rate, (step + 1) / recipe.warmup)) for step, (stage, rate) in enumerate(steps)]


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

    from metis_agent.worlds.gallery.agent import COLD_START

    recipe = Recipe()
    torch.set_num_threads(1)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as bars:
        task = bars.add_task("cold start", total=recipe.steps, loss=float("nan"))
        train_cold_start(
            COLD_START, recipe, progress=lambda step, loss, _: bars.update(task, completed=step, loss=loss)
        )


if __name__ == "__main__":
    _main()
