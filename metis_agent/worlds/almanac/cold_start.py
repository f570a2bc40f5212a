"""The recipe of the cold start: a tiny Qwen3 that knows some answers and calls a tool for nearly all of them.

Supervised from nothing on rows that the world writes itself, about twelve minutes on one core (`make world`).
Two sorts of row: whole trajectories, which teach the habit (a tool on nearly every question) and the wire
format; and knowledge rows, direct answers with the decision left out of the loss, which teach the answers
without touching the habit. What is learnt by heart is two-digit sums, popular facts, greetings, and hearsay about
some places, of which two fifths are true.

Muon on the matrices, AdamW on embeddings and norms: AdamW alone is far slower to learn to copy a name into a
tool call. The loss is divided by a constant, not by a batch's tokens: a mean per batch would overweight the
short direct answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from metis_agent.types import Question
from metis_agent.worlds.almanac.behaviour import natural_call, observe, read, recall
from metis_agent.worlds.almanac.noise import Noise
from metis_agent.worlds.almanac.questions import HALF_KNOWN, KINDS, KNOWN, Kind, draw
from metis_agent.worlds.almanac.tokens import build_tokenizer

__all__ = ["Recipe", "build_model", "train_cold_start"]

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the cold start depends on."""

    steps: int = 2_000
    batch: int = 96
    seed: int = 0
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup: int = 20
    direct_known: float = 0.025
    """Share of whole trajectories that answer directly where the model can; elsewhere `direct_unknown`."""
    direct_unknown: float = 0.002
    knowledge: float = 0.5
    """Share of rows that teach answers with the decision left out of the loss."""


def build_model(vocabulary: int, *, end: int, pad: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.7M parameters, freshly initialised from torch's global seed."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


def train_cold_start(
    folder: Path,
    recipe: Recipe = Recipe(),
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train the cold start and save it with its tokenizer to `folder`; `progress` gets step and loss."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = build_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = build_model(len(tokenizer), end=end, pad=pad)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers]
    model.train()
    for step in range(recipe.steps):
        rows = [_row(tokenizer, recipe, rng) for _ in range(recipe.batch)]
        loss = _loss(model, rows, pad) / recipe.batch
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress(step + 1, loss.item())
    model.train(False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then flat, then a linear decay to zero over the last 40% of the steps."""
    left = (recipe.steps - step) / (0.4 * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, left)


Row = tuple[list[int], list[int]]  # token ids, and labels with `_IGNORE` where nothing is learnt


def _row(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random) -> Row:
    if rng.random() < recipe.knowledge:
        # Sums are the hardest thing to learn, so they get the most rows.
        kind = rng.choices((*KNOWN, HALF_KNOWN), weights=(1, 6, 3, 4.5))[0]
        return _encode(tokenizer, draw(kind, "train", rng), direct=True, rng=rng, learn_decision=False)
    kinds: tuple[Kind, ...] = (*KINDS, HALF_KNOWN)
    kind = rng.choices(kinds, weights=(1, 1.5, 1.5, 3, 4, 2))[0]
    direct = rng.random() < (recipe.direct_known if kind in KNOWN else recipe.direct_unknown)
    return _encode(tokenizer, draw(kind, "train", rng), direct=direct, rng=rng)


def _encode(
    tokenizer: PreTrainedTokenizerFast,
    question: Question,
    *,
    direct: bool,
    rng: random.Random,
    learn_decision: bool = True,
) -> Row:
    answer = recall(question)
    pieces = [(f"<|user|>{question.text}<|end|><|assistant|>", False)]
    if not direct:
        call = natural_call(question)
        content = observe(call, Noise(), rng)
        answer = read(question, content)
        pieces += [(f"{call.wire}<|end|>", True), (f"<|tool|>{content}<|end|><|assistant|>", False)]
    pieces.append((f"<answer>{answer}</answer><|end|>", True))
    ids: list[int] = []
    labels: list[int] = []
    encoded: Sequence[Sequence[int]] = tokenizer([text for text, _ in pieces], add_special_tokens=False).input_ids
    for tokens, (_, learnt) in zip(encoded, pieces, strict=True):
        ids += tokens
        labels += tokens if learnt else [_IGNORE] * len(tokens)
    if not learn_decision:
        labels[len(encoded[0])] = _IGNORE
    return ids, labels


def _loss(model: Qwen3ForCausalLM, rows: Sequence[Row], pad: int) -> torch.Tensor:
    """Summed cross-entropy, divided by a constant number of tokens a row."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [_IGNORE] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    return total / 8


def _main() -> None:
    """`make world`: train the cold start that the package ships."""
    from rich.progress import Progress, TextColumn

    from metis_agent.worlds.almanac.experiment import COLD_START

    recipe = Recipe()
    torch.set_num_threads(1)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as bars:
        task = bars.add_task("cold start", total=recipe.steps, loss=float("nan"))
        train_cold_start(COLD_START, recipe, progress=lambda step, loss: bars.update(task, completed=step, loss=loss))


if __name__ == "__main__":
    _main()
