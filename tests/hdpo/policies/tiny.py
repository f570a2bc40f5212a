"""Tiny random models with tokenizers trained in place, and a world with a rule that is planted in it."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from metis_agent.rollouts.outcomes import OutcomeTable

THINGS = (("sum", "total", "product", "mean"), ("river", "mayor", "song", "film"), ("guest", "team", "choir", "crew"))
DESCRIPTIONS = {"calculator": "computes numbers", "wiki": "looks up facts"}
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for block in message.content %}"
    "{%- if block.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{%- else %}{{ block.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>", "[CLS]", "[SEP]")
VISION = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
WORDS = (
    "Can this be answered rightly without any tool with the best of tools Which is for Answer Yes or No only letter "
    "option that fits A to B C calculator wiki abacus library computes numbers looks up facts hello say please now "
    "Compute Find Say the and fits best note Whats user assistant image"
)


def tokenizer(*, chat: bool) -> Any:
    """Words and every printable character."""
    plain = dict.fromkeys((*WORDS.split(), *sum(THINGS, ()), *string.ascii_letters))
    words = dict.fromkeys((*SPECIAL, *VISION, *plain, *(f" {word}" for word in plain), *string.printable))
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[\s\S]"), behavior="isolated")
    fast.decoder = decoders.Fuse()
    if not chat:
        ids = [(word, list(words).index(word)) for word in ("[CLS]", "[SEP]")]
        fast.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=fast, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<|unk|>", model_max_length=256
    )
    wrapped.add_tokens([AddedToken(word, special=True, normalized=False) for word in (*SPECIAL, *VISION)])
    if chat:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_bert(folder: Path) -> str:
    """A BERT of two layers."""
    torch.manual_seed(0)
    words = tokenizer(chat=False)
    config = BertConfig(
        vocab_size=len(words), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def save_qwen(folder: Path) -> str:
    """A Qwen3 of two layers."""
    torch.manual_seed(0)
    words = tokenizer(chat=True)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=512, initializer_range=0.1,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def planted(
    n: int, seed: int = 0, *, context: bool = False, tools: Iterable[str] = ("calculator", "wiki")
) -> OutcomeTable:
    """Computing needs the calculator, finding needs the wiki, greetings need neither."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n)
    asked = ("Compute the {} of {}", "Find the {} of {}", "Say hello to the {} of {}")
    questions = tuple(
        asked[kind].format(rng.choice(THINGS[kind]), rng.choice([*string.ascii_lowercase])) for kind in kinds
    )
    known = {"calculator": (0.95, 0.05, 0.95), "wiki": (0.05, 0.95, 0.95)}
    p = np.array([(0.05, 0.05, 0.95), *(known[tool] for tool in tools)]).T[kinds]
    return OutcomeTable(
        questions=questions,
        actions=("direct", *tools),
        correct=(rng.random(p.shape) < p).astype(float),
        cost=np.tile([0.0] + [1.0] * (p.shape[1] - 1), (n, 1)),
        seconds=np.full(p.shape, np.nan),
        contexts=tuple(f"note {i}" for i in rng.integers(0, 100, n)) if context else (),
    )
