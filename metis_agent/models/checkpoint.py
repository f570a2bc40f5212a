"""Loading a model folder, with an error that teaches for every way in which one can be broken."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from metis_agent.errors import CheckpointError
from metis_agent.models.processors import load_processor, reads_images

__all__ = ["LoadedCheckpoint", "load_checkpoint"]

_REMEDY = "Give a folder that save_pretrained wrote for model and tokenizer, or copy or download it again."


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A model in evaluation mode, its tokenizer, and the processor of one that reads images."""

    model: Any
    tokenizer: Any
    processor: Any = None


def load_checkpoint(
    path: str | PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | str = "auto"
) -> LoadedCheckpoint:
    """Load a causal language model, also one that reads images, from a local folder; only safetensors, never pickle.

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
        tokenizer = processor.tokenizer if processor else AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if processor and not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = processor.chat_template
        # The annotation of from_pretrained does not know output_loading_info.
        loader: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
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
    if not getattr(tokenizer, "chat_template", None):
        raise CheckpointError(
            f"The tokenizer in {str(folder)!r} has no chat template (chat_template.jinja), so messages can't "
            "become a prompt. Use the instruct variant of the model."
        )
    return LoadedCheckpoint(model=model.to(device).eval(), tokenizer=tokenizer, processor=processor)


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
