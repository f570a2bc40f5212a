"""Images on their way into a model: from content blocks to the tokens that stand for them and the pixels beside.

Between messages and prompt ids. The model's own processor says how many tokens an image becomes and what its pixel
tensors are, one image at a time, so that a picture that hundreds of rollouts look at is worked on once. Images are
those of human and tool messages, in their order: the order in which the Python tool names them `image_1`, `image_2`.
Only bytes that are in the message are read; nothing is fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from langchain_core.messages import BaseMessage, HumanMessage, ToolMessage
from torch import Tensor

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.messages import image_source
from metis_agent.models.chat_tokenizer import Recent
from metis_agent.tools.images import load_image

__all__ = ["ImageReader", "SeenImage"]

_CACHED = 256_000_000
"""Bytes of pixels that are remembered: a picture of a million pixels takes 25 MB."""
_IMAGE_BLOCKS = ("image", "image_url")
_TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")
_TOKEN_KEYS = ("input_ids", "attention_mask", *_TYPE_KEYS)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenImage:
    """An image as the model gets it."""

    digest: str
    """Of the source: the file's bytes, or the data URI."""
    text: str
    """What stands for it in the prompt: a placeholder for every token."""
    tensors: Mapping[str, Tensor]
    """The model's further arguments, such as `pixel_values` and `image_grid_thw`; several images are joined along
    the first dimension."""


class ImageReader:
    """Reads images with a model's processor. Safe to use from many threads.

    Args:
        processor: A transformers processor of images and text, such as `Qwen3VLProcessor`.

    Raises:
        ConfigurationError: The processor has no image placeholder, or reads no images.
    """

    def __init__(self, processor: Any) -> None:
        self.placeholder = str(getattr(processor, "image_token", None) or "")
        if not self.placeholder or getattr(processor, "image_processor", None) is None:
            raise ConfigurationError(
                f"The processor {type(processor).__name__} has no image_token or no image_processor, so it can't put "
                "an image into a prompt. Pass the processor of the model, as AutoProcessor loads it."
            )
        self._processor = processor
        self._seen: Recent[SeenImage] = Recent(_CACHED, lambda _, image: _bytes_of(image))
        others = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        self._marks = tuple(dict.fromkeys(str(mark) for mark in others if mark))
        unknown = processor.tokenizer.unk_token_id
        ids = {processor.tokenizer.convert_tokens_to_ids(mark) for mark in self._marks}
        self.banned: tuple[int, ...] = tuple(sorted(ids - {None, unknown}))
        """Tokens that a reply must not hold: a placeholder without an image behind it breaks the next prompt."""
        self.identity = str(processor.image_processor.to_json_string())
        """Settings of the processor, for the hash of the template."""

    def of(self, message: BaseMessage) -> list[SeenImage]:
        """The images of a message, in order; none of a message that is neither human nor a tool's.

        Raises:
            InputError: A human's can't be read, or is only an address. A tool's is left out: see `readable`.
        """
        if not isinstance(message, HumanMessage | ToolMessage) or isinstance(message.content, str):
            return []
        blocks = [block for block in self.readable(message).content if _is_image(block)]
        return [self.see(_source_of(cast(dict[str, Any], block))) for block in blocks]

    def readable(self, message: BaseMessage) -> BaseMessage:
        """The message, but where a tool shows what can't be read as an image, a line that says so.

        What a tool brings may be any stranger's, and must not end the conversation.
        """
        if not isinstance(message, ToolMessage) or isinstance(message.content, str):
            return message
        content = [self._or_note(block) for block in message.content]
        return message if content == message.content else message.model_copy(update={"content": content})

    def _or_note(self, block: str | dict[Any, Any]) -> str | dict[Any, Any]:
        if not isinstance(block, dict) or not _is_image(block):
            return block
        try:
            self.see(_source_of(block))
        except InputError as error:
            return {"type": "text", "text": f"[image not shown: {str(error)[:200]}]"}
        return block

    def see(self, source: str | bytes) -> SeenImage:
        """An image, processed; remembered by its source.

        Args:
            source: The file's bytes, or a data URI.

        Raises:
            InputError: It can't be read, or it is an address.
        """
        if isinstance(source, str) and source[:5].lower() != "data:":
            raise InputError(
                f"The model can't see the image {source[:80]!r}: it fetches nothing. Put the image's bytes into the "
                "message, as base64."
            )
        digest = hashlib.sha256(
            source.encode(errors="surrogatepass") if isinstance(source, str) else source
        ).hexdigest()
        return self._seen.get(digest, lambda: self._process(source, digest))

    def plain(self, text: str) -> str:
        """A text in which placeholders are words: whoever writes one must not claim an image that is not there."""
        for mark in self._marks:
            text = text.replace(mark, " ".join(mark)) if mark in text else text
        return text

    def expand(self, text: str, images: Sequence[SeenImage]) -> str:
        """The text with each placeholder replaced by what stands for its image, as the processor does it.

        Raises:
            InputError: There are not as many placeholders as images.
        """
        pieces = text.split(self.placeholder)
        if len(pieces) != len(images) + 1:
            raise InputError(
                f"The chat template wrote {len(pieces) - 1} placeholders {self.placeholder!r} for {len(images)} "
                "images: it does not know images in one of these roles. Use the model's own template, or leave them "
                "out."
            )
        parts = [pieces[0]]
        for image, piece in zip(images, pieces[1:], strict=True):
            parts += [image.text, piece]
        return "".join(parts)

    def inputs(self, ids_BP: Tensor, images: Sequence[SeenImage], dtype: torch.dtype) -> dict[str, Tensor]:
        """The model's arguments beside `input_ids` and `attention_mask`, on the device of the ids.

        Args:
            ids_BP: Prompts (and completions), padded on either side.
            images: Of all rows, row by row; empty for a batch of text.
            dtype: Of the model; pixels are given in it.
        """
        if not images:
            return {}
        joined = {name: torch.cat([image.tensors[name] for image in images]) for name in images[0].tensors}
        inputs = {
            name: value.to(ids_BP.device, dtype if value.is_floating_point() else None)
            for name, value in joined.items()
        }
        for name in _TYPE_KEYS:
            if name in self._processor.model_input_names:
                types = self._processor.create_mm_token_type_ids(ids_BP.tolist())
                inputs[name] = torch.tensor(types, device=ids_BP.device)
        return inputs

    def _process(self, source: str | bytes, digest: str) -> SeenImage:
        picture = load_image(source).convert("RGB")
        try:
            features = self._processor(text=[self.placeholder], images=[picture], return_tensors="pt")
        except (ValueError, ZeroDivisionError) as error:  # an aspect ratio of 1 to 200, say
            raise InputError(
                f"The model's processor refuses an image of {picture.width} x {picture.height} pixels: {error}. "
                "Crop it or pad it."
            ) from error
        tensors = {name: value for name, value in features.items() if name not in _TOKEN_KEYS}
        text = self._processor.tokenizer.decode(features["input_ids"][0].tolist(), skip_special_tokens=False)
        return SeenImage(digest=digest, text=str(text), tensors=tensors)


def _is_image(block: object) -> bool:
    return isinstance(block, dict) and block.get("type") in _IMAGE_BLOCKS


def _bytes_of(image: SeenImage) -> int:
    return sum(value.nbytes for value in image.tensors.values())


def _source_of(block: Mapping[str, Any]) -> str | bytes:
    source = image_source(block)
    if source is None:
        raise InputError(
            f"An image block with the keys {sorted(block)!r} holds no bytes. Give them as base64: "
            '{"type": "image", "base64": ..., "mime_type": "image/png"}.'
        )
    return source
