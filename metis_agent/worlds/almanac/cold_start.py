"""The recipe of the cold start: a tiny Qwen3 that knows some answers and calls a tool for nearly all of them.

Its tokenizer has about 500 word-level tokens and every printable ASCII character, so that any English text has a
spelling. Popular names are single tokens, as frequent words are in real vocabularies; obscure ones are spelled in
syllables: otherwise a model could not tell what it knows. The template and the `<tool_call>` JSON are those of Qwen and
Metis, shortened to single tokens.

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

import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from metis_agent.types import Question
from metis_agent.worlds import TRAINED_ON_TOOLS, chat_template
from metis_agent.worlds.almanac import questions
from metis_agent.worlds.almanac.agent import COLD_START, ERROR, Noise, SeekingModel, almanac_search
from metis_agent.worlds.almanac.facts import COUNTRIES, RUMOURS, SYLLABLES, Place, entries, linked_entries, place
from metis_agent.worlds.almanac.questions import CALLS_NEEDED, KINDS, KNOWN, PARTIALLY_KNOWN, Kind, draw

__all__ = [
    "CHAT_TEMPLATE",
    "END",
    "NOTHING",
    "UNKNOWN",
    "Call",
    "Recipe",
    "build_model",
    "build_tokenizer",
    "natural_call",
    "observe",
    "read",
    "recall",
    "train_cold_start",
    "train_seeking_cold_start",
]


END = "<|end|>"
_SPECIAL = ("<|pad|>", END, "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_WIRE = (
    "<answer>", "</answer>", "<tool_call>", "</tool_call>",
    '{"name": "python", "arguments": {"code": "',
    '{"name": "text_search", "arguments": {"query": "',
    '"}}',
)  # fmt: skip
_ENTRY_WORDS = (
    " was", " founded", " in", " and", " lies", " on", " the", " river", " is", " its", " money", " capital",
    "unknown",
)  # fmt: skip

CHAT_TEMPLATE = chat_template("{%- else -%}{{- message.content -}}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, the same on every machine."""
    vocabulary = list(dict.fromkeys((*_SPECIAL, *_WIRE, *string.printable[:95], *_words())))
    longest_first = sorted((token for token in vocabulary if len(token) > 1), key=len, reverse=True)
    pieces = "|".join(re.escape(token) for token in longest_first)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pieces}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token=END,
        unk_token="<|unk|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _words() -> Iterator[str]:
    """Words of the questions and answers (with the space before them), popular names, syllables."""
    yield from _ENTRY_WORDS
    for text in questions.phrasings():
        # A space before a name or a number is a token of its own, so that copying a name is copying tokens.
        yield from re.findall(r"^[A-Za-z]+| [A-Za-z]+", re.sub(r"\{\w+\}", "", text))
    for country in COUNTRIES:
        yield from (country.name, country.capital, country.currency, country.continent)
    for syllable in SYLLABLES:
        yield syllable
        yield syllable.capitalize()


NOTHING = "No results."
UNKNOWN = "unknown"
"""What the model says when a tool leaves it without an answer."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A tool call with one argument."""

    tool: str
    key: str
    value: str

    @property
    def wire(self) -> str:
        """As the model writes it."""
        arguments = json.dumps({self.key: self.value})
        return f'<tool_call>{{"name": "{self.tool}", "arguments": {arguments}}}</tool_call>'


def natural_call(question: Question) -> Call:
    """Numbers go to Python, names to the search, and a greeting is searched for too."""
    numbers = re.findall(r"\d+", question.text)
    if question.verifier == "numeric" and len(numbers) == 2:
        sign = "*" if question.kind == "product" else "+"
        return Call(tool="python", key="code", value=f"{numbers[0]}{sign}{numbers[1]}")
    words = re.findall(r"\w+", question.text)
    names = [word for word in words if word in entries()]
    return Call(tool="text_search", key="query", value=names[0] if names else words[0])


def observe(call: Call, noise: Noise, rng: random.Random) -> str:
    """What the tool will say, worked out without running it."""
    if call.tool == "text_search":
        content = entries().get(call.value, NOTHING)
    else:
        a, sign, b = re.split(r"([+*])", call.value)
        content = str(int(a) * int(b) if sign == "*" else int(a) + int(b))
    return noise.apply(content, rng) or ERROR


def recall(question: Question) -> str:
    """The answer that the model knows, or believes it knows, by heart."""
    if question.kind != PARTIALLY_KNOWN:
        return question.answer or ""
    it = next(_heard_of()[word] for word in re.findall(r"\w+", question.text) if word in _heard_of())
    return it.hearsay(question.metadata["relation"])


def read(question: Question, content: str) -> str:
    """The answer that the model reads off an observation."""
    if question.kind == "greeting":
        return question.answer or ""
    if content in (ERROR, NOTHING):
        return UNKNOWN
    if question.verifier == "numeric":
        return content
    found = re.search(_VALUES[question.metadata["relation"]], content)
    return found[1] if found else UNKNOWN


@cache
def _heard_of() -> dict[str, Place]:
    return {it.name: it for it in map(place, range(RUMOURS))}


_VALUES = {
    "founded": r"founded in (\d+)",
    "river": r"the river (\w+)",
    "capital": r"capital is (\w+)",
    "currency": r"money the (\w+)",
    "continent": r" is in (\w+)",
}


_IGNORE = -100
_PART = 16
"""Rows at a time."""


Row = tuple[list[int], list[int]]  # token ids, and labels with `_IGNORE` where nothing is learnt


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
        **TRAINED_ON_TOOLS,
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
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    return _train(model, tokenizer, _row, torch.optim.Muon, folder, recipe, progress)


SEEKING = Recipe(batch=48, muon_lr=0.01, adamw_lr=1e-3, knowledge=0.4)
"""The recipe of the cold start of two hops."""


def train_seeking_cold_start(
    folder: Path,
    recipe: Recipe = SEEKING,
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train the packaged cold start further, on runs of the agent that never has enough (`SeekingModel`).

    Of its habit, the sister towns that it knows by heart, and answering from what it has read at any step, the habit
    comes first: after 160 steps it makes 1.34 calls too many a question and .98 of those needed, but answers .255
    rightly. The packaged weights read 12 of 12 entries as they know them, and 0 of 12 that name a sister town as well,
    so reading is learnt anew: after 1,000 steps .82 of 60 questions are right, after 2,000 .955 of 600. One step takes
    1.4 s of a core.
    """
    torch.manual_seed(recipe.seed)
    return _train(
        Qwen3ForCausalLM.from_pretrained(COLD_START), build_tokenizer(), _seeking_row, _Muon, folder, recipe, progress
    )


class _Muon(torch.optim.Muon):
    """Torch's, in float32: its bfloat16 is emulated on most processors, and takes a third of a step's time."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                tall = len(update) > update.shape[1]
                update = update.T if tall else update
                update = update / update.norm().clamp(min=group["eps"])
                a, b, c = group["ns_coefficients"]
                for _ in range(group["ns_steps"]):
                    gram = update @ update.T
                    update = a * update + (b * gram + c * gram @ gram) @ update
                scale = max(1.0, len(weight) / weight.shape[1]) ** 0.5
                weight.sub_(update.T if tall else update, alpha=group["lr"] * scale)


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    row: Callable[[PreTrainedTokenizerFast, Recipe, random.Random], Row],
    muon: Callable[..., torch.optim.Optimizer],
    folder: Path,
    recipe: Recipe,
    progress: Callable[[int, float], None],
) -> Path:
    rng, pad = random.Random(recipe.seed), tokenizer.pad_token_id
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, recipe)) for o in optimizers]
    model.train()
    for step in range(recipe.steps):
        # In order of their length, some at a time: a long run pads few others.
        rows = sorted((row(tokenizer, recipe, rng) for _ in range(recipe.batch)), key=lambda it: len(it[0]))
        loss = 0.0
        for part in (rows[start : start + _PART] for start in range(0, len(rows), _PART)):
            of_part = _loss(model, part, pad) / recipe.batch
            of_part.backward()  # type: ignore[no-untyped-call]
            loss += of_part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        progress(step + 1, loss)
    model.train(False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then flat, then a linear decay to zero over the last 40% of the steps."""
    left = (recipe.steps - step) / (0.4 * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, left)


def _seeking_row(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random) -> Row:
    """A whole run of the seeking agent, or what it answers at one of its states, the decision left out of the loss."""
    kind = rng.choices(tuple(CALLS_NEEDED), weights=(1, 3, 2, 2, 3, 3))[0]
    question = draw(kind, "train", rng)
    agent = SeekingModel()
    read: list[BaseMessage] = [HumanMessage(question.text)]
    stop = rng.randrange(3) + CALLS_NEEDED[kind] if rng.random() < recipe.knowledge else None
    pieces = [(f"<|user|>{question.text}<|end|><|assistant|>", False)]
    while (calls := len(pieces) // 2) != stop and (call := agent.reply(read, search=True)).tool_calls:
        found = _found(call.tool_calls[0]["args"]["query"])
        read += [call, ToolMessage(found, tool_call_id=str(calls))]
        wire = Call(tool="text_search", key="query", value=call.tool_calls[0]["args"]["query"]).wire
        pieces += [(f"{wire}<|end|>", stop is None), (f"<|tool|>{found}<|end|><|assistant|>", False)]
    pieces.append((f"<answer>{agent.reply(read, search=False).text}</answer><|end|>", True))
    return _tokens(tokenizer, pieces, learn_decision=stop is None)


@cache
def _found(query: str) -> str:
    return linked_entries().get(query) or str(almanac_search(linked=True).invoke({"query": query}))


def _row(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random) -> Row:
    if rng.random() < recipe.knowledge:
        # Sums are the hardest thing to learn, so they get the most rows.
        kind = rng.choices((*KNOWN, PARTIALLY_KNOWN), weights=(1, 6, 3, 4.5))[0]
        return _encode(tokenizer, draw(kind, "train", rng), direct=True, rng=rng, learn_decision=False)
    kinds: tuple[Kind, ...] = (*KINDS, PARTIALLY_KNOWN)
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
    return _tokens(tokenizer, pieces, learn_decision=learn_decision)


def _tokens(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[tuple[str, bool]], *, learn_decision: bool) -> Row:
    """Pieces of text, and whether each is learnt; or all but the last piece's first token, which is a decision."""
    ids: list[int] = []
    labels: list[int] = []
    encoded: Sequence[Sequence[int]] = tokenizer([text for text, _ in pieces], add_special_tokens=False).input_ids
    for tokens, (_, learnt) in zip(encoded, pieces, strict=True):
        ids += tokens
        labels += tokens if learnt else [_IGNORE] * len(tokens)
    if not learn_decision:
        labels[-len(encoded[-1])] = _IGNORE
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
