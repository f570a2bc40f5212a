"""A processor for Qwen3-VL that reads still images and needs Pillow alone.

The stock `Qwen3VLProcessor` insists on a video processor, and that on torchvision, of which there is no CPU build
beside every PyTorch. Images need neither: transformers' own Pillow image processor makes the same patches. So this is
the stock processor with nothing for videos; `metis_agent.models.processors` takes it where the stock one can't load.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3VLProcessor

__all__ = ["StillsProcessor"]


class StillsProcessor(Qwen3VLProcessor):
    """`Qwen3VLProcessor` without videos.

    Args:
        image_processor: Such as `Qwen2VLImageProcessorPil`.
        tokenizer: With `<|image_pad|>` among its tokens.
        chat_template: By default the tokenizer's.
        **options: Further arguments of `Qwen3VLProcessor`.
    """

    # The signature says which parts a processor loads and saves.
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **options: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **options)  # type: ignore[no-untyped-call]
