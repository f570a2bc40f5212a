"""What a search backend is: a query goes in, hits come out, best first; of texts, and of images.

Stands between `TextSearchTool`, which shows hits to a model, and whatever finds them: the embedded
`CorpusSearch`, a LangChain retriever (`RetrieverSearch`), or a class of your own with this one method. Likewise between
`ImageSearchTool` and `DdgsImageSearch` (the web, by words) or `ImageFolder` (files here, by words and by likeness).
Text that strangers wrote is made fit to be shown to a model: visible, short, on one line, without markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import urlsplit

from langchain_core.documents import Document as LangChainDocument
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import ToolException

from metis_agent.errors import ToolError, note_outage

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AsyncSearchBackend",
    "ImageEmbedder",
    "ImageHit",
    "ImageSearchBackend",
    "RetrieverSearch",
    "SearchBackend",
    "SearchHit",
    "SearchRefusedError",
    "SearchUnavailableError",
    "SimilarImageBackend",
    "as_told",
    "cut",
    "for_the_model",
    "plain_text",
    "visible",
    "web_link",
]


class SearchUnavailableError(ToolError):
    """The search gave no answer, for a reason that may pass by itself: another try is worth it."""


class SearchRefusedError(ToolError):
    """The search gave nothing, and does not say whether nothing matches or it refuses to answer for now."""


def for_the_model(error: Exception) -> ToolException:
    """The error of a search as LangChain hands it to the model; an outage is noted."""
    if isinstance(error, SearchUnavailableError | SearchRefusedError):
        note_outage(SearchUnavailableError(str(error)))
    return ToolException(str(error))


@contextmanager
def as_told(*kinds: type[Exception]) -> Iterator[None]:
    """Within it a backend searches: a `ToolError` is for the model to read, as an error of these kinds is.

    Any other error is raised as it is, and noted: the search gave no answer.
    """
    told: tuple[type[Exception], ...] = (ToolError, *kinds)
    try:
        yield
    except told as error:
        raise for_the_model(error) from error
    except Exception as error:
        note_outage(error)
        raise


@dataclass(frozen=True, kw_only=True)
class SearchHit:
    """One thing found."""

    text: str
    title: str = ""
    url: str = ""
    """Where it can be read, or empty."""
    source: str = ""
    """Which document of which collection it is, in the backend's own words."""
    score: float = 0.0
    """Higher is better; only comparable within one answer."""


@runtime_checkable
class SearchBackend(Protocol):
    """Finds documents for a query; called from many threads at once."""

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return at most `limit` hits, best first; an empty list where nothing fits.

        Raises:
            ToolError: the search failed in a way that the model may read and act on.
        """


@runtime_checkable
class AsyncSearchBackend(SearchBackend, Protocol):
    """A backend that can also wait without a thread; one that can't is run in a thread."""

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`."""


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


class RetrieverSearch:
    """Asks a retriever; of a document's metadata, `title`, `url`, `source` and `score` are used."""

    def __init__(self, retriever: BaseRetriever) -> None:
        self._retriever = retriever

    def search(self, query: str, limit: int) -> list[SearchHit]:
        """Return the retriever's first `limit` documents, in its order."""
        return _hits(self._retriever.invoke(query), limit)

    async def asearch(self, query: str, limit: int) -> list[SearchHit]:
        """As `search`."""
        return _hits(await self._retriever.ainvoke(query), limit)


def _hits(documents: Sequence[LangChainDocument], limit: int) -> list[SearchHit]:
    return [_hit(document) for document in documents[:limit]]


def _hit(document: LangChainDocument) -> SearchHit:
    metadata = document.metadata
    score = metadata.get("score", 0.0)
    return SearchHit(
        text=document.page_content,
        title=str(metadata.get("title") or ""),
        url=str(metadata.get("url") or ""),
        source=str(metadata.get("source") or document.id or ""),
        score=float(score) if isinstance(score, int | float) else 0.0,
    )


# Controls, bidirectional and other invisible characters, half surrogates, and the "tag" characters and
# variation selectors that can smuggle whole sentences. The joiners 200C and 200D stay: Persian, Hindi and
# emoji need them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\ufe00-\ufe0e\U000e0000-\U000e0fff]"
)
# A tag has a letter, "/", "!" or "?" right after the bracket, so that "a < b" stays; one that is never closed ends
# at the next, and a comment with the text. Possessive quantifiers make matching linear.
_TAG = re.compile(r"<!--(?:[^-]|-(?!->))*+(?:-->)?|<(/?)([A-Za-z][A-Za-z0-9:-]*+|[/!?])[^<>]*+>?")
_HIDDEN = frozenset({"script", "style", "template", "noscript"})
_MAX_READ = 20_000
_MAX_LINK = 2_000


def visible(text: str, length: int) -> str:
    """Return the text as one line, without what can't be seen; enough of it to be cut to `length`."""
    # A text may be huge: what lies far beyond the cut need not be looked at.
    return " ".join(_UNSEEN.sub("", text[: 8 * length + 1_000]).split())


def cut(text: str, length: int) -> str:
    """Return one visible line of at most `length` characters, cut between words where one ends nearby."""
    line = visible(text, length)
    if len(line) <= length:
        return line
    head = line[: length - 1]
    space = head.rfind(" ", max(0, length - 40))
    return f"{head[:space] if space > 0 else head}…"


def plain_text(value: object, length: int) -> str:
    """Return any value as one visible line of at most `length` characters, its HTML resolved and gone."""
    if value is None:
        return ""
    text = html.unescape(str(value)[:_MAX_READ])
    return cut(_without_tags(text) if "<" in text else text, length)


def web_link(value: object) -> str:
    """Return an http or https address as it is; an empty string for anything else."""
    link = value.strip() if isinstance(value, str) and len(value) <= _MAX_LINK else ""
    if not link.isprintable() or any(character.isspace() or character in "<>\"'`\\" for character in link):
        return ""
    try:
        parts = urlsplit(link)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError:
        return ""
    # A name and password before the host pass it off as another: https://bank.com@evil.com.
    return link if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc else ""


def _without_tags(text: str) -> str:
    kept: list[str] = []
    done, hidden = 0, ""
    for tag in _TAG.finditer(text):
        if not hidden:
            kept += (text[done : tag.start()], " ")
        done = tag.end()
        closing, name = tag[1], (tag[2] or "").lower()
        if hidden:
            hidden = "" if closing and name == hidden else hidden
        elif name in _HIDDEN and not closing:
            hidden = name
    return "".join(kept if hidden else (*kept, text[done:]))
