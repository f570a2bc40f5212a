"""What image search finds, and the protocols of what finds it: by words, by likeness, by meaning.

Stands between `ImageSearchTool`, which shows hits to a model, and its backends: `DdgsImageSearch` (the web, by
words) and `ImageFolder` (files here, both ways).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from metis_agent.tools.search.base import SearchHit

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageEmbedder", "ImageHit", "ImageSearchBackend", "SimilarImageBackend"]


@dataclass(frozen=True, kw_only=True)
class ImageHit(SearchHit):
    """One image found; `text` is what is known of it, and `url` the page that it stands on."""

    image: str
    """Its http(s) address, or the name of a file within its collection."""
    thumbnail: str = ""
    """An http(s) address or a data URI of a small version, or empty."""
    width: int = 0
    """In pixels; 0 where unknown, as for `height`."""
    height: int = 0


@runtime_checkable
class ImageSearchBackend(Protocol):
    """Finds images for words; called from many threads at once."""

    def search(self, query: str, limit: int) -> list[ImageHit]:
        """Return at most `limit` hits, best first; an empty list where nothing fits.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


@runtime_checkable
class SimilarImageBackend(Protocol):
    """Finds images like an image; called from many threads at once."""

    def similar(self, image: Image, limit: int) -> list[ImageHit]:
        """Return at most `limit` hits, most alike first; an empty list where none is.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


class ImageEmbedder(Protocol):
    """A model that puts images and words into one space, such as CLIP or SigLIP."""

    name: str
    """Which model and version; embeddings that another one made are not compared."""

    def embed_images(self, images: Sequence[Image]) -> list[list[float]]:
        """Return a vector of fixed length for each image."""

    def embed_text(self, text: str) -> list[float]:
        """Return the vector of a text, of the same length."""
