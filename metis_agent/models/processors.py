"""The processor of a model folder: what turns its images into patches, and their places into tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_torchvision_available

from metis_agent.models.stills import StillsProcessor

__all__ = ["load_processor", "reads_images"]

_STILLS = ("qwen3_vl", "qwen3_vl_moe")


def reads_images(folder: Path) -> bool:
    """Whether the folder's model is one of images and text."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_processor(folder: Path) -> Any:
    """The model's own processor; a Qwen3-VL's without its videos, where torchvision is not there to read them.

    Raises:
        ImportError: Another model's processor needs a library that is not installed.
        OSError, ValueError: The folder has none, or it is damaged.
    """
    if _is_stills(folder):
        return StillsProcessor.from_pretrained(folder, local_files_only=True)
    loader: Any = AutoProcessor  # it has no annotations
    processor = loader.from_pretrained(folder, local_files_only=True)
    if getattr(processor, "image_processor", None) is None:  # what is found without one is the bare tokenizer
        raise ValueError("it has no image processor (preprocessor_config.json or processor_config.json)")
    return processor


def _is_stills(folder: Path) -> bool:
    """A Qwen3-VL that was saved without videos, or that meets a machine without torchvision."""
    if AutoConfig.from_pretrained(folder, local_files_only=True).model_type not in _STILLS:
        return False
    settings = folder / "processor_config.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return saved.get("processor_class") == StillsProcessor.__name__ or not is_torchvision_available()
