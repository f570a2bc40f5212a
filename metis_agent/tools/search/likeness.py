"""How alike images are: by a fingerprint, or in meaning, by the embeddings of a model.

By its fingerprint an image is known again after scaling, re-encoding or a slight change of colour: the difference hash
(N. Krawetz, "Kind of like that", 2013), along rows and along columns, with the mean colour beside it, since all flat
images have the same hash. It does not find crops, rotations or mirror images.

`ClipEmbedder` (CLIP, SigLIP and their like) needs the `train` extra, which brings transformers and PyTorch; neither is
imported before the first one is made.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metis_agent.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ClipEmbedder", "Fingerprint", "fingerprint"]

_SIDE = 8
_BITS = 2 * _SIDE * _SIDE
_MAX_COLOUR = 40


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is compared."""

    bits: int
    """128 bits: whether brightness rises from each of 8 x 8 places to the next one, to the right and downwards."""
    colour: tuple[int, int, int]
    """Mean red, green and blue, 0 to 255."""

    def likeness(self, other: Fingerprint) -> float:
        """From 1.0, the same, to 0.0; unrelated images come to about 0.5, and to 0.0 where the colours differ."""
        if max(abs(a - b) for a, b in zip(self.colour, other.colour, strict=True)) > _MAX_COLOUR:
            return 0.0
        return 1.0 - (self.bits ^ other.bits).bit_count() / _BITS


def fingerprint(image: Image) -> Fingerprint:
    """Return the fingerprint of an image in mode RGB or RGBA; what shows through counts as white."""
    if image.mode == "RGBA":
        from PIL import Image as image_module

        ground = image_module.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    colours = image.convert("RGB").resize((_SIDE + 1, _SIDE + 1), resample=5, reducing_gap=3.0)  # 5: HAMMING
    grey = colours.convert("L").tobytes()
    width = _SIDE + 1
    bits = 0
    for y in range(_SIDE):
        for x in range(_SIDE):
            here = y * width + x
            bits = bits << 2 | (grey[here] < grey[here + 1]) << 1 | (grey[here] < grey[here + width])
    mean = colours.resize((1, 1), resample=4).tobytes()  # 4: BOX
    return Fingerprint(bits=bits, colour=(mean[0], mean[1], mean[2]))


class ClipEmbedder:
    """Any model of transformers that embeds images and texts in one space; safe to use from several threads.

    Args:
        model: a folder with a model and its processor, or a hub's name of one.
        name: tells apart what embedded an index; by default the model's own.
        device: such as "cuda:0".
        batch: images that are embedded at a time.

    Raises:
        MissingDependencyError: transformers or PyTorch is not installed.
        CheckpointError: there is no such model, or it does not embed images and texts.
    """

    def __init__(self, model: str | os.PathLike[str], *, name: str = "", device: str = "cpu", batch: int = 16) -> None:
        self.name = name or os.path.basename(os.path.normpath(os.fspath(model)))
        """Which model it is: an index that another one made is read anew."""
        self._model, self._processor = _loaded(os.fspath(model), device)
        self._device, self._batch = device, max(1, batch)
        self._lock = threading.Lock()

    def embed_images(self, images: Sequence[Image]) -> list[list[float]]:
        """Return a vector for each image."""
        vectors: list[list[float]] = []
        for start in range(0, len(images), self._batch):
            batch = [image.convert("RGB") for image in images[start : start + self._batch]]
            vectors += self._features("get_image_features", images=batch)
        return vectors

    def embed_text(self, text: str) -> list[float]:
        """Return the vector of a text; what is longer than the model reads is cut."""
        # SigLIP was trained with texts of full length only, and CLIP does not mind.
        return self._features("get_text_features", text=[text], padding="max_length", truncation=True)[0]

    def _features(self, method: str, **inputs: Any) -> list[list[float]]:
        import torch

        with self._lock, torch.inference_mode():
            prepared = self._processor(**inputs, return_tensors="pt").to(self._device)
            found = getattr(self._model, method)(**prepared)
            # Transformers 5 gives the features within the encoder's output.
            features = found if isinstance(found, torch.Tensor) else found.pooler_output
            listed: list[list[float]] = features.float().cpu().tolist()
        return listed


def _loaded(model: str, device: str) -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoProcessor
    except ImportError as missing:
        raise MissingDependencyError(
            "search by meaning needs transformers; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    model_type: Any = AutoModel
    processor_type: Any = AutoProcessor
    try:
        # Said, or transformers asks on standard input whether code of the folder may run; and reads pickles.
        loaded = model_type.from_pretrained(model, trust_remote_code=False, use_safetensors=True).eval().to(device)
        processor = processor_type.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a foreign folder can fail anywhere
        raise CheckpointError(
            f"{model!r} can't be loaded ({error}); name a folder with a model and its processor."
        ) from error
    if not (hasattr(loaded, "get_image_features") and hasattr(loaded, "get_text_features")):
        raise CheckpointError(
            f"{model!r} is a {type(loaded).__name__}, which does not embed images and texts; name a CLIP or SigLIP."
        )
    return loaded, processor
