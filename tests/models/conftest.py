"""A tiny Qwen3 with random weights, and a tokenizer of its own: what every test here runs on."""

from __future__ import annotations

import copy
import re
import string
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from metis_agent.models.local import LocalChatModel
from tests.one_thread import one_thread as one_thread

WORDS = ("Hello", " world", " is", " the", " answer", " tool", "python", '", "', '{"', '":', ' {"')
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<reason>",
    "</reason>",
)

TOOLS_AND_MESSAGES = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{%- for tool in tools %}\n{{ tool | tojson }}{%- endfor %}"
    "<|im_end|>\n{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and message.reasoning_content %}ASSISTANT_THINKING{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
APPEND_ONLY = TOOLS_AND_MESSAGES.replace("ASSISTANT_THINKING", "")
"""Like Qwen3 instruct models: what was rendered once stays as it is."""

STRIPS_THINKING = TOOLS_AND_MESSAGES.replace(
    "ASSISTANT_THINKING",
    "{%- if loop.last %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}",
)
"""Like Qwen3's thinking models: only the last reply keeps its thinking."""


PYTHON: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run code.",
        "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def build_tokenizer(template: str = APPEND_ONLY) -> Any:
    """Words, tags and every printable character."""
    pieces = list(dict.fromkeys((*SPECIAL, *TAGS, *WORDS, *string.printable)))
    longest_first = sorted((piece for piece in pieces if len(piece) > 1), key=len, reverse=True)
    pattern = "|".join(re.escape(piece) for piece in longest_first)
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", unk_token="<|unk|>"
    )
    wrapped.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    wrapped.chat_template = template
    return wrapped


def build_policy(tokenizer: Any, seed: int = 0) -> Any:
    """A random model whose distribution is far from uniform, so that its log-probabilities mean something."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def biased(policy: Any, token: int) -> Any:
    """The policy with one token almost certain at every position."""
    model = copy.deepcopy(policy)
    extra = torch.zeros(model.config.vocab_size)
    extra[token] = 60.0
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + extra)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def policy(tokenizer: Any) -> Any:
    return build_policy(tokenizer)


@pytest.fixture
def chat(policy: Any, tokenizer: Any) -> LocalChatModel:
    """Samples at temperature 1."""
    return LocalChatModel(model=policy, tokenizer=tokenizer, temperature=1.0, max_new_tokens=12)


@pytest.fixture
def says(chat: LocalChatModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the next replies say given texts, by forcing every token of them (the last text repeats)."""

    def script(*texts: str) -> LocalChatModel:
        left = list(texts)

        def forced(self: LocalChatModel, choice: str, tools: Any) -> tuple[int, ...]:
            text = left.pop(0) if len(left) > 1 else left[0]
            return tuple(chat.tokenizer(f"{text}<|im_end|>")["input_ids"])

        monkeypatch.setattr(LocalChatModel, "_forced", forced)
        return chat.model_copy(update={"max_new_tokens": 200})

    return script
