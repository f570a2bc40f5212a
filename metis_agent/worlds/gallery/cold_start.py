"""The recipe of the gallery's cold start: a tiny Qwen3-VL that reads, points and crops, and crops far too often.

Supervised from nothing on pictures that the world draws (`make gallery`). Three stages: *look* (read a large number,
read a crop, point at the cell of a tiny one), *act* (whole trajectories, nearly all with a call, beside direct answers
with the decision left out of the loss, which keep the reading), *polish* (the same on new pictures at half the rate).

What it needs to see at all: Muon on the matrices, AdamW on embeddings, norms and the patch convolution, and a start
in which positions and patches are loud. Padding goes on the right: a causal model does not see it.

So many steps teach it to point, to crop and to call nearly always; of numbers that it has never seen it still reads too
few (`metis_agent.worlds.gallery.agent.measure_policy` says how many).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from metis_agent.models.stills import StillsProcessor
from metis_agent.worlds.gallery.pictures import CANVAS, CELL, VIEW, Exhibit, Size, draw, exhibit
from metis_agent.worlds.gallery.questions import FORMS, texts
from metis_agent.worlds.gallery.tokens import IMAGE, MERGE, PATCH, SHOWN, build_processor, crop_code

__all__ = ["Recipe", "Stage", "build_model", "train_cold_start"]

_IGNORE = -100
_IMAGE_TOKENS = (VIEW // PATCH // MERGE) ** 2

Task = Literal["read", "read_crop", "point", "act"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training: rows of each kind in a batch, and the rate from its start to its end."""

    steps: int
    rows: tuple[tuple[Task, Size, int], ...]
    rates: tuple[float, float]


_ACTING: tuple[tuple[Task, Size, int], ...] = (
    ("act", "large", 16), ("act", "tiny", 16), ("read", "large", 16), ("read_crop", "tiny", 16),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the cold start depends on."""

    stages: tuple[Stage, ...] = (
        Stage(
            steps=800,
            rows=(("read", "large", 16), ("read_crop", "tiny", 16), ("point", "tiny", 16)),
            rates=(1.0, 1.0),
        ),
        Stage(steps=300, rows=_ACTING, rates=(1.0, 0.1)),
        Stage(steps=200, rows=_ACTING, rates=(0.5, 0.0)),
    )
    seed: int = 0
    muon_lr: float = 0.03
    adamw_lr: float = 3e-3
    warmup: int = 20
    direct_large: float = 0.04
    """Share of whole trajectories that answer directly where the number is large; elsewhere `direct_tiny`."""
    direct_tiny: float = 0.002
    pool: int = 600
    """Pictures of each size to draw from; `fresh` of them are drawn anew each step."""
    fresh: int = 2


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
    rng = random.Random(recipe.seed)
    processor = build_processor()
    model = build_model(processor)
    rows = _Rows(processor, recipe, rng)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.9, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    base = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    for step, (stage, rate) in enumerate(_schedule(recipe)):
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        batch = rows.batch(stage)
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        progress(step + 1, loss.item(), model)
    model.train(False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _schedule(recipe: Recipe) -> list[tuple[Stage, float]]:
    """Stage and rate of each step."""
    steps: list[tuple[Stage, float]] = []
    for stage in recipe.stages:
        first, last = stage.rates
        steps += [(stage, first + (last - first) * step / stage.steps) for step in range(stage.steps)]
    return [(stage, min(rate, (step + 1) / recipe.warmup)) for step, (stage, rate) in enumerate(steps)]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A picture as the model sees it, whole and through a crop."""

    it: Exhibit
    view: Image.Image
    crop: Image.Image


def _seen(it: Exhibit) -> _Seen:
    picture, (left, top) = draw(it), (place * CELL for place in it.cell)
    crop = picture.crop((left, top, left + CELL, top + CELL)).resize((CANVAS, CANVAS))
    # What the image processor would do first; doing it here keeps a thousand pictures small.
    shrunk = [image.resize((VIEW, VIEW), Image.Resampling.BICUBIC) for image in (picture, crop)]
    return _Seen(it=it, view=shrunk[0], crop=shrunk[1])


@dataclass(frozen=True, kw_only=True)
class _Row:
    ids: list[int]
    labels: list[int]
    """`_IGNORE` where nothing is learnt."""
    images: list[Image.Image]


class _Rows:
    """Draws rows; the pictures come from a pool that is renewed little by little."""

    def __init__(self, processor: StillsProcessor, recipe: Recipe, rng: random.Random) -> None:
        self._processor, self._recipe, self._rng = processor, recipe, rng
        self._tokenizer: Any = processor.tokenizer
        self._texts = texts("train")
        sizes: tuple[Size, ...] = ("large", "tiny")
        self._pool = {size: [self._new(size) for _ in range(recipe.pool)] for size in sizes}

    def batch(self, stage: Stage) -> dict[str, torch.Tensor]:
        """The model's inputs, with `labels`."""
        for size, seen in self._pool.items():
            for _ in range(self._recipe.fresh):
                seen[self._rng.randrange(len(seen))] = self._new(size)
        rows = [self._row(task, self._rng.choice(self._pool[size])) for task, size, n in stage.rows for _ in range(n)]
        width = max(len(row.ids) for row in rows)
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([row.ids + [pad] * (width - len(row.ids)) for row in rows])
        pictures: Any = self._processor.image_processor
        pixels = pictures([image for row in rows for image in row.images], return_tensors="pt")
        return {
            "input_ids": ids,
            "labels": torch.tensor([row.labels + [_IGNORE] * (width - len(row.ids)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows]),
            "mm_token_type_ids": (ids == self._processor.image_token_id).int(),
            **pixels,
        }

    def _new(self, size: Size) -> _Seen:
        return _seen(exhibit(self._rng.choice(self._texts), size, self._rng))

    def _row(self, task: Task, seen: _Seen) -> _Row:
        asked = self._rng.choice(FORMS[seen.it.look])
        first = seen.crop if task == "read_crop" else seen.view
        pieces = [(f"<|user|><|vision_start|>{_PLACE}<|vision_end|>{asked}<|end|><|assistant|>", False)]
        share = self._recipe.direct_large if seen.it.size == "large" else self._recipe.direct_tiny
        answer = f"{seen.it.text}</answer><|end|>"
        if task == "point":
            return self._encode([*pieces, *_call(seen.it, only_place=True)], [first])
        if task == "act" and self._rng.random() >= share:
            pieces += [
                *_call(seen.it),
                (f"<|tool|>{SHOWN}<|vision_start|>{_PLACE}<|vision_end|><|end|><|assistant|>", False),
                (f"<answer>{answer}", True),
            ]
            return self._encode(pieces, [first, seen.crop])
        # The decision is the first token of the answer: learnt where the row is about acting.
        return self._encode([*pieces, ("<answer>", task == "act"), (answer, True)], [first])

    def _encode(self, pieces: Sequence[tuple[str, bool]], images: list[Image.Image]) -> _Row:
        ids: list[int] = []
        labels: list[int] = []
        encoded: Sequence[Sequence[int]] = self._tokenizer([text for text, _ in pieces], add_special_tokens=False)[
            "input_ids"
        ]
        for tokens, (_, learnt) in zip(encoded, pieces, strict=True):
            ids += tokens
            labels += tokens if learnt else [_IGNORE] * len(tokens)
        return _Row(ids=ids, labels=labels, images=images)


_PLACE = IMAGE * _IMAGE_TOKENS


def _call(it: Exhibit, *, only_place: bool = False) -> list[tuple[str, bool]]:
    """The call that crops; of pointing, only the coordinates are learnt."""
    code = crop_code(it.cell)
    name, arguments = '{"name": "python", "arguments": {"code": ', json.dumps(code)[1:-1]
    if not only_place:
        return [(f'<tool_call>{name}"{arguments}"}}}}</tool_call><|end|>', True)]
    start = code.index("((") + 1
    return [(f'<tool_call>{name}"{code[:start]}', False), (code[start : code.index(".resize")], True)]


def _loss(model: Qwen3VLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy, divided by a constant number of tokens a row."""
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    return total / (4 * len(labels))


def _main() -> None:
    """`make gallery`: train the cold start."""
    from rich.progress import Progress, TextColumn

    folder, recipe = Path("runs/gallery/cold_start"), Recipe()
    torch.set_num_threads(1)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as bars:
        task = bars.add_task("cold start", total=sum(stage.steps for stage in recipe.stages), loss=float("nan"))
        train_cold_start(folder, recipe, progress=lambda step, loss, _: bars.update(task, completed=step, loss=loss))
    print(f"The policy is in {folder}.")


if __name__ == "__main__":
    _main()
