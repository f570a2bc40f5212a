"""The tiny model's tokenizer, chat template and image processor.

Words of the questions and of the signs, the parts of a crop as single tokens, and every printable ASCII character. A
word on a sign is one token, as frequent words are in real vocabularies, and a number is read digit by digit; a
coordinate is one token with the comma after it, so it can't be taken for a number that is read.
"""

from __future__ import annotations

import re
import string
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.worlds.chat_template import chat_template
from metis_agent.worlds.gallery.pictures import CANVAS, CELL, GRID, VIEW, WORDS
from metis_agent.worlds.gallery.questions import FIRST, LAST, phrasings

__all__ = [
    "CHAT_TEMPLATE",
    "END",
    "IMAGE",
    "MERGE",
    "PATCH",
    "SEARCH",
    "SHOWN",
    "build_processor",
    "crop_code",
    "found_text",
]

END = "<|end|>"
IMAGE = "<|image_pad|>"
PATCH, MERGE = 8, 2

SHOWN = f"[image 1: {CANVAS} x {CANVAS} pixels]"
"""What the Python tool says of the crop, before the crop itself."""
SEARCH = '{"name": "image_search", "arguments": {"image": "image_1"}}'
"""The call that looks for the picture in the collection, as the model writes it."""

_VISION = ("<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>")
_SPECIAL = ("<|pad|>", END, "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", *_VISION)
_CROP, _ENLARGE = "image_1.crop(", f".resize(({CANVAS}, {CANVAS}))"
_WIRE = (
    "<answer>", "</answer>", "<tool_call>", "</tool_call>", '{"name": "python", "arguments": {"code": "', '"}}',
    _CROP, _ENLARGE, SHOWN, SEARCH, "[1] ", ".png\n", f"{CANVAS} x {CANVAS} pixels\n", "Painted by ", "unknown",
)  # fmt: skip

CHAT_TEMPLATE = chat_template(
    "{%- elif message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for block in message.content -%}"
    "{%- if block.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- block.text -}}{%- endif -%}"
    "{%- endfor -%}"
)


def crop_code(cell: tuple[int, int]) -> str:
    """The Python that enlarges one cell of the grid, as the model writes it."""
    left, top = (place * CELL for place in cell)
    return f"{_CROP}({left}, {top}, {left + CELL}, {top + CELL})){_ENLARGE}"


def found_text(file: str, caption: str) -> str:
    """What the image search says of the one picture that it found."""
    return f"[1] {file}\n{CANVAS} x {CANVAS} pixels\n{caption}"


def build_processor() -> StillsProcessor:
    """Tokenizer, template and image processor, the same on every machine."""
    images: Any = Qwen2VLImageProcessorPil
    pixels = {"shortest_edge": VIEW * VIEW, "longest_edge": VIEW * VIEW}
    return StillsProcessor(
        image_processor=images(
            size=pixels, patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, image_mean=[0.5] * 3,
            image_std=[0.3] * 3,
        ),
        tokenizer=_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = list(
        dict.fromkeys(
            (
                *_SPECIAL,
                *_WIRE,
                *_coordinates(),
                *string.printable[:95],
                *WORDS,
                *FIRST,
                *(f" {name}" for name in LAST),
                *_words(),
            )
        )
    )
    longest_first = sorted((token for token in vocabulary if len(token) > 1), key=len, reverse=True)
    pieces = "|".join(re.escape(token) for token in longest_first)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pieces}|[\\s\\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=END, unk_token="<|unk|>", padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    wrapped.add_tokens([AddedToken(token, special=True, normalized=False) for token in _VISION])
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _coordinates() -> list[str]:
    """Left, top and right with what stands around them, then bottom."""
    edges = [place * CELL for place in range(GRID + 1)]
    return [f"({edge}, " for edge in edges] + [f"{edge}, " for edge in edges] + [f"{edge}))" for edge in edges]


def _words() -> list[str]:
    """Words of the questions, with the space before them."""
    return [word for form in phrasings() for word in re.findall(r"^[A-Za-z]+| [A-Za-z]+", form)]
