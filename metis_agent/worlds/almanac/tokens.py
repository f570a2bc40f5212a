"""The tiny model's tokenizer and chat template.

About 500 word-level tokens and every printable ASCII character, so that any English text has a spelling.
Popular names are single tokens, as frequent words are in real vocabularies; obscure ones are spelled in
syllables: otherwise a model could not tell what it knows. The template and the `<tool_call>` JSON are those
of Qwen and Metis, shortened to single tokens.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metis_agent.worlds.almanac import questions
from metis_agent.worlds.almanac.facts import COUNTRIES, SYLLABLES
from metis_agent.worlds.chat_template import chat_template

__all__ = ["CHAT_TEMPLATE", "END", "build_tokenizer"]

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
