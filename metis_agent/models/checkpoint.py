"""Loading a model folder, with an error that teaches for every way in which one can be broken.

A model that reads images comes with its processor, what turns images into patches and their places into tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    Qwen3VLProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_torchvision_available

from metis_agent.errors import CheckpointError

__all__ = [
    "LoadedCheckpoint",
    "StillsProcessor",
    "convert_gguf",
    "load_checkpoint",
    "load_processor",
    "reads_images",
    "save_checkpoint",
]


# Where it isn't said, transformers asks on standard input whether the folder's code may run.
_TRUST_NOTHING: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_REMEDY = "Give a folder that save_pretrained wrote for model and tokenizer, or copy or download it again."


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A model in evaluation mode, its tokenizer, and the processor of one that reads images."""

    model: Any
    tokenizer: Any
    processor: Any = None


def load_checkpoint(
    path: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = "auto",
    chat_template: str | None = None,
) -> LoadedCheckpoint:
    """Load a causal language model, also one that reads images, from a local folder; only safetensors, never pickle.

    A `chat_template` takes the place of the folder's.

    Raises:
        CheckpointError: The folder or a part of it is missing, truncated, or of another kind of model.
    """
    folder = Path(path)
    _check_config(folder)
    for file in _weight_files(folder):
        _check_weights(file)
    kind = "causal language model"
    try:
        if sees := reads_images(folder):
            kind = "vision language model"
        processor = load_processor(folder) if sees else None
        tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(folder, **_TRUST_NOTHING)
        if processor and not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = processor.chat_template
        # The annotation of from_pretrained does not know output_loading_info.
        loader: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            folder,
            dtype=dtype,
            **_TRUST_NOTHING,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they come into the report, with all others
        )
    except Exception as error:  # a foreign folder can fail anywhere; tokenizers raises bare Exception
        raise CheckpointError(f"{str(folder)!r} does not load as a {kind}: {error} {_REMEDY}") from error
    model, report = loaded
    wrong = sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str)
    if wrong:
        raise CheckpointError(
            f"The weights in {str(folder)!r} do not fit its config.json: {len(wrong)} tensors are missing or "
            f"have another shape, such as {wrong[0]!r}. Loading would make them random numbers. {_REMEDY}"
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} has no chat template (chat_template.jinja), so messages can't "
            "become a prompt. Use the instruct variant of the model."
        )
    return LoadedCheckpoint(model=model.to(device).eval(), tokenizer=tokenizer, processor=processor)


def convert_gguf(source: Path, out: Path) -> None:
    """Read a GGUF file, and leave it in `out` as a model folder of bfloat16.

    Raises:
        CheckpointError: The file does not load.
    """
    loader: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": source.name, **_TRUST_NOTHING}
    try:
        model = loader.from_pretrained(
            source.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    except Exception as error:  # a foreign file can fail anywhere
        raise CheckpointError(f"{str(source)!r} does not load: {type(error).__name__}: {error}") from error
    save_checkpoint(model, tokenizer, out)


def save_checkpoint(model: Any, tokenizer: Any, out: Path) -> None:
    """Save both in a new folder `out`, which is there when all of it is; until then it is `out.part`."""
    part = out.with_name(f"{out.name}.part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(out)


def _check_config(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"There is no folder {str(folder)!r}. Models are loaded from local folders; get one from the "
            "Hub with `hf download OWNER/NAME --local-dir FOLDER`."
        )
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{str(folder)!r} has no config.json, so it is no model folder. {_REMEDY}")
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(config)!r} is not JSON ({error}). {_REMEDY}") from error
    if not isinstance(read, dict) or "model_type" not in read:
        raise CheckpointError(f"{str(config)!r} names no model_type: it is another program's file. {_REMEDY}")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(index)!r} has no readable weight_map ({error!r}). {_REMEDY}") from error
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{str(folder)!r} lacks its weights {missing!r}. Weights are safetensors files; pickled ones "
            f"(.bin) are never loaded. {_REMEDY}"
        )
    return files


def _check_weights(file: Path) -> None:
    """Read the header, which tells how long the file must be."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(file)!r} is not a whole safetensors file ({error}): it was truncated or damaged. {_REMEDY}"
        ) from error


_STILLS = ("qwen3_vl", "qwen3_vl_moe")


def reads_images(folder: Path) -> bool:
    """Whether the folder's model is one of images and text."""
    config = AutoConfig.from_pretrained(folder, **_TRUST_NOTHING)
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def load_processor(folder: Path) -> Any:
    """The model's own processor; a Qwen3-VL's without its videos, where torchvision is not there to read them.

    Raises:
        ImportError: Another model's processor needs a library that is not installed.
        OSError, ValueError: The folder has none, or it is damaged.
    """
    if _is_stills(folder):
        return StillsProcessor.from_pretrained(folder, **_TRUST_NOTHING)
    loader: Any = AutoProcessor  # it has no annotations
    processor = loader.from_pretrained(folder, **_TRUST_NOTHING)
    if getattr(processor, "image_processor", None) is None:  # what is found without one is the bare tokenizer
        raise ValueError("it has no image processor (preprocessor_config.json or processor_config.json)")
    return processor


def _is_stills(folder: Path) -> bool:
    """A Qwen3-VL that was saved without videos, or that meets a machine without torchvision."""
    if AutoConfig.from_pretrained(folder, **_TRUST_NOTHING).model_type not in _STILLS:
        return False
    settings = folder / "processor_config.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return saved.get("processor_class") == StillsProcessor.__name__ or not is_torchvision_available()


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
