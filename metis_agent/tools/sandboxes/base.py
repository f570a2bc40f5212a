"""What a sandbox is: it opens sessions; a session runs code, keeps its names, and shares with nobody.

Where it stands: `metis_agent.tools.python` runs the model's code in a session; `choose.open_sandbox` finds
a backend that really contains on this machine. Other backends (a remote one, say) implement these two
protocols.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, runtime_checkable

from metis_agent.errors import ConfigurationError, InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

    from metis_agent.tools.images import ImageRules

__all__ = [
    "NO_IMAGES",
    "Closing",
    "Execution",
    "ExecutionStatus",
    "InputImage",
    "Sandbox",
    "SandboxLimits",
    "SandboxSession",
    "ShownImage",
    "encode_image",
    "encode_pixels",
    "load_or_say",
]

NO_IMAGES: Mapping[str, InputImage] = MappingProxyType({})

ExecutionStatus = Literal["ok", "error", "timeout", "killed"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What became of one piece of code. Everything in it was under the code's control: it is data."""

    status: ExecutionStatus
    """`ok`; `error`: an exception; `timeout`: stopped at the time limit; `killed`: its process ended."""
    stdout: str = ""
    """What was printed, up to the limit; also what was printed before a timeout."""
    stderr: str = ""
    traceback: str = ""
    """For `error`: the traceback, trimmed to the lines of the code itself."""
    result: str | None = None
    """The `repr` of the value of a last expression; `None` if there is none, it is `None`, or it is an image."""
    images: tuple[ShownImage, ...] = ()
    """Figures and images that the code showed, in its order: what it displayed, the value of a last expression,
    figures that are still open."""
    notes: tuple[str, ...] = ()
    """What became of images that are not as the code asked for: not loaded, left out, made smaller."""
    reason: str = ""
    """For `timeout` and `killed`: what happened, in words."""
    seconds: float = 0.0
    """Wall-clock time of the call."""
    truncated: bool = False
    """True where output, traceback or result was longer than the limit and was cut."""

    @property
    def ok(self) -> bool:
        """True where the code ran to its end."""
        return self.status == "ok"

    @property
    def state_lost(self) -> bool:
        """True where the session's process ended: variables and files of earlier calls are gone."""
        return self.status in ("timeout", "killed")


class SandboxSession(Protocol):
    """A Python session: names and files last from call to call. Safe to use from several threads."""

    def run(self, code: str, timeout: float | None = None, images: Mapping[str, InputImage] = NO_IMAGES) -> Execution:
        """Run code; after a timeout or a death the next call works, in a new and empty process.

        Args:
            code: Python source, as in a notebook cell.
            timeout: seconds; by default the session's limit.
            images: names that the code finds bound to Pillow images. What the session has from an earlier call is
                not sent again; one that can't be used gives a note.

        Raises:
            InputError: the code can't be sent (too long).
            SandboxGoneError: the sandbox itself failed, or the session is closed.
        """
        ...

    def close(self) -> None:
        """End the session, and a call that is running in it; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Sandbox(Protocol):
    """A way to run code. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """What contains the code, such as "bubblewrap + Landlock + seccomp"."""
        ...

    @property
    def limits(self) -> SandboxLimits:
        """The limits of a session that asks for no others."""
        ...

    def open(self, limits: SandboxLimits | None = None) -> SandboxSession:
        """Open a fresh session.

        Raises:
            SandboxUnavailableError: this backend can't work on this machine.
            SandboxGoneError: the backend failed just now.
        """
        ...

    def close(self) -> None:
        """End every session and the backend itself; may be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


_MB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """Limits of one session.

    Raises:
        ConfigurationError: a value is not a number in its range.
    """

    seconds: float = 10.0
    """Wall-clock time of one call, in seconds."""
    memory_mb: int = 512
    """Address space beyond what the interpreter and its packages take, in MiB."""
    processes: int = 32
    """Threads, the main one included (Linux counts a thread as a process). New processes never start."""
    disk_mb: int = 64
    """All files of the session together, and the largest one, in MiB."""
    output_bytes: int = 16_384
    """Kept of stdout, of stderr, of the traceback and of the result, each, in bytes of UTF-8."""
    images: int = 4
    """Figures and images that come back from one call; 0 for none."""
    image_pixels: int = 2_000_000
    """Width times height of each of them; a larger one is made smaller."""

    def __post_init__(self) -> None:
        _check_seconds(self.seconds)
        for name, least, most in (
            ("memory_mb", 16, 1 << 20),
            ("processes", 1, 4096),
            ("disk_mb", 1, 1 << 20),
            ("output_bytes", 256, 64 * _MB),
            ("images", 0, 64),
            ("image_pixels", 256, 16_000_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigurationError(
                    f"SandboxLimits({name}={value!r}): it must be a whole number from {least} to {most}. "
                    f"The default is {type(self).__dataclass_fields__[name].default}."
                )


def _check_seconds(value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and 0 < value <= 86_400):  # type: ignore[arg-type, operator]
        raise ConfigurationError(
            f"SandboxLimits(seconds={value!r}): it must be a number of seconds above 0 and up to 86400 (a day)."
        )


class Closing(ABC):
    """Closed when its `with` block ends."""

    @abstractmethod
    def close(self) -> None:
        """End it; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_MAX_BYTES = 2_000_000
_QUALITIES = (95, 90, 75, 50)
_MANY_COLOURS = 1 << 16
_REMEDY = "images need Pillow; install it with: pip install 'langgraph-metis[images]'"


@dataclass(frozen=True, kw_only=True)
class InputImage:
    """An image that code may work on; loaded when a session first needs it."""

    source: str | bytes = field(repr=False)
    """As `load_image` takes it: the file's bytes, a data URI, or an http(s) address."""
    rules: ImageRules | None = None
    """What is loaded; by default as `load_image` has it."""

    def load(self, seconds: float = math.inf) -> Image:
        """Return the image, in mode RGB or RGBA.

        Args:
            seconds: that it may take, where the rules give it more.

        Raises:
            InputError: it can't be used; the message says why.
            MissingDependencyError: Pillow is not installed.
        """
        try:
            from metis_agent.tools.images import ImageRules, load_image
        except ImportError as missing:  # of an HTTP client, which the same extra brings
            raise MissingDependencyError(_REMEDY) from missing
        return load_image(self.source, (self.rules or ImageRules()).within(seconds))


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image that code showed, as a file."""

    base64: str = field(repr=False)
    """The file, encoded: an artifact has to go through JSON."""
    mime_type: str
    width: int
    """In pixels, as `height`."""
    height: int

    @property
    def content(self) -> bytes:
        """The file: PNG or JPEG, at most 2 MB."""
        return b64decode(self.base64)


def load_or_say(name: str, image: InputImage, seconds: float = math.inf) -> tuple[Image | None, str]:
    """The image; or `None`, and why it is not there in words for the model."""
    try:
        return image.load(seconds), ""
    except (InputError, MissingDependencyError) as error:
        return None, f"{name} is not there: {error}"


def encode_pixels(width: int, height: int, pixels: bytes | memoryview) -> ShownImage:
    """Return an image of RGB pixels, row by row, as a file.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as missing:
        raise MissingDependencyError(_REMEDY) from missing
    return encode_image(Image.frombytes("RGB", (width, height), pixels))


def encode_image(image: Image) -> ShownImage:
    """Return an RGB image as a file of at most 2 MB: PNG of what is drawn, JPEG of what looks like a photograph."""
    content, mime_type = b"", "image/png"
    if image.getcolors(_MANY_COLOURS) is not None:
        # Level 1 takes a third of the time of the default, for files that are little larger.
        content = _saved(image, "PNG", compress_level=1)
    for quality in _QUALITIES:
        if not 0 < len(content) <= _MAX_BYTES:
            content, mime_type = _saved(image, "JPEG", quality=quality), "image/jpeg"
    while len(content) > _MAX_BYTES:
        image = image.reduce(2)
        content = _saved(image, "JPEG", quality=_QUALITIES[-1])
    encoded = b64encode(content).decode()
    return ShownImage(base64=encoded, mime_type=mime_type, width=image.width, height=image.height)


def _saved(image: Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
