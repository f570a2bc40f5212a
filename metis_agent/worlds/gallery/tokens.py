"""What the tiny vision model has before it learns: tokenizer, template, image processor, and a vision tower that sees.

Words of the questions and of the signs, the parts of a crop as single tokens, and every printable ASCII character. A
word on a sign is one token, as frequent words are in real vocabularies, and a number is read digit by digit; a
coordinate is one token with the comma after it, so it can't be taken for a number that is read.

The vision tower learns to tell digits, words and places before it has a language model behind it, as in real VLMs,
whose towers come trained. What is to be told of a picture is told by a linear map of its image tokens, pooled over
them; the map is thrown away afterwards. A step costs a third of one with the language model, and what a picture shows
reaches the tower directly.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_agent.models.checkpoint import StillsProcessor
from metis_agent.worlds import chat_template
from metis_agent.worlds.gallery.pictures import CANVAS, CELL, COLOURS, GRID, VIEW, WORDS, Exhibit
from metis_agent.worlds.gallery.questions import FIRST, LAST, phrasings

__all__ = [
    "CHAT_TEMPLATE",
    "END",
    "IMAGE",
    "MERGE",
    "PATCH",
    "SEARCH",
    "SHOWN",
    "SightHead",
    "Told",
    "build_processor",
    "crop_code",
    "found_text",
    "told_of",
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


Told = tuple[tuple[int, int], ...]
"""(first output, class) of everything that a picture tells."""

_DIGITS = 10
_WORDS = 2 * _DIGITS
_BARS = _WORDS + len(WORDS)
_CELLS = _BARS + 2 * _DIGITS * len(COLOURS)
_OUTPUTS = _CELLS + GRID * GRID
_SIZES = {
    0: _DIGITS, _DIGITS: _DIGITS, _WORDS: len(WORDS), _CELLS: GRID * GRID,
    **{_BARS + _DIGITS * place: _DIGITS for place in range(2 * len(COLOURS))},
}  # fmt: skip


def told_of(it: Exhibit, *, legible: bool) -> Told:
    """What a picture tells: what can be read in it, or else the cell where something stands."""
    if not legible:
        column, row = it.cell
        return ((_CELLS, row * GRID + column),)
    if it.content == "word":
        return ((_WORDS, WORDS.index(it.text)),)
    if it.content == "number":
        return (0, int(it.text[0])), (_DIGITS, int(it.text[1]))
    told: list[tuple[int, int]] = []
    for bar in it.bars:
        first = _BARS + 2 * _DIGITS * COLOURS.index(bar.colour)
        told += [(first, int(bar.value[0])), (first + _DIGITS, int(bar.value[1]))]
    return tuple(told)


class SightHead(nn.Module):
    """Tells a picture's classes from its image tokens.

    Args:
        width: Of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.told = nn.Linear(width, _OUTPUTS)

    def loss(self, tower: Any, pixels: dict[str, Tensor], told: Sequence[Told]) -> tuple[Tensor, float]:
        """Cross-entropy per picture, and the share of all that was told that is right.

        Args:
            tower: The vision model.
            pixels: `pixel_values` and `image_grid_thw` of the pictures.
            told: What each of them tells.
        """
        seen = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        outputs = self.told(seen.view(len(told), -1, seen.shape[-1])).logsumexp(1)
        total, right, count = outputs.new_zeros(()), 0, 0
        for first, size in _SIZES.items():
            pairs = [(place, cls) for place, each in enumerate(told) for start, cls in each if start == first]
            if not pairs:
                continue
            places, classes = torch.tensor(pairs).T
            logits = outputs[places, first : first + size]
            total = total + nn.functional.cross_entropy(logits, classes, reduction="sum")
            right, count = right + int((logits.argmax(1) == classes).sum()), count + len(pairs)
        return total / len(told), right / count
