"""The E2B SDK's own client, with what it lacks, and the `Execution` that a call's messages make.

Defects of the SDK that are met here (e2b-code-interpreter 2.11, e2b 2.63; read in their source):

- an answer is read line by line into memory, whatever its size: `_Watched` ends it at `MOST_BYTES`
- an answer that was cut short between two lines passes for a whole one: `Exchange.finished` knows better
- `AuthenticationException` and `ServiceBusyException` are no `SandboxException`, and a refused or broken
  connection is an `httpx` error: `execute` and `translated` sort them all
- `timeout=T` ends a call at twice T: the session keeps the time itself, and cancels

Everything in an answer was under the code's control: texts are cut, images are kept for the safe loader. The local
backends move bare pixels; E2B's protocol moves files, so here what the code wrote does reach a decoder of the host:
Pillow's PNG or JPEG reader, behind the rules of `load_image`. Imports the SDK; only `E2BSandbox` imports this, when one
is made.
"""

from __future__ import annotations

import re
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING

import httpx
from e2b import (
    AuthenticationException,
    NotFoundException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    TimeoutException,
)
from e2b_code_interpreter.code_interpreter_async import AsyncSandbox

from metis_agent.errors import (
    InfrastructureError,
    InputError,
    MissingDependencyError,
    SandboxGoneError,
    SandboxUnavailableError,
)
from metis_agent.tools.sandboxes.base import (
    Execution,
    ExecutionStatus,
    InputImage,
    SandboxLimits,
    ShownImage,
    encode_image,
    load_or_say,
)

if TYPE_CHECKING:
    from e2b_code_interpreter.models import ExecutionError, OutputMessage, Result

__all__ = [
    "MOST_BYTES",
    "BrokenAnswerError",
    "Call",
    "Exchange",
    "FloodError",
    "NotRunningError",
    "RemoteSandbox",
    "SandboxDiedError",
    "UnreachableError",
    "binding",
    "image_file",
    "shown_images",
    "translated",
]

_END = b'"end_of_execution"'
_TAIL = 64
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_KERNEL_ENDED = ("ContextRestarting", "UnexpectedEndOfExecution")
"""What E2B's server reports, as an error without a traceback, when the process that runs the code ends."""


@dataclass
class Exchange:
    """What was seen of an answer on its way."""

    status: int | None = None
    """The HTTP status; `None` while nothing has come."""
    received: int = 0
    """Bytes of the body so far."""
    _tail: bytes = b""

    def see(self, chunk: bytes) -> None:
        """Count a piece of the body."""
        self.received += len(chunk)
        self._tail = (self._tail + chunk[-_TAIL:])[-_TAIL:]

    @property
    def finished(self) -> bool:
        """Whether the message came with which a whole answer ends."""
        return _END in self._tail


@dataclass
class Text:
    """The first bytes of a text that comes in pieces."""

    capacity: int
    _kept: bytearray = field(default_factory=bytearray)
    dropped: bool = False

    def add(self, piece: object) -> None:
        """Add a piece, as far as there is room."""
        if not isinstance(piece, str):
            raise TypeError(f"a text is {type(piece).__name__}")
        room = self.capacity - len(self._kept)
        # No character takes less than a byte, so what is beyond need not be encoded.
        encoded = piece[: room + 1].encode("utf-8", "replace")
        self._kept += encoded[:room]
        self.dropped |= len(encoded) > room

    def __str__(self) -> str:
        return self._kept.decode("utf-8", "ignore")


class Call:
    """One call. Its `on_...` are the SDK's callbacks."""

    def __init__(self, limits: SandboxLimits) -> None:
        self.exchange = Exchange()
        self.encoded: list[str] = []
        """Images that the code showed, in base64."""
        self.images: tuple[ShownImage, ...] = ()
        self.notes: list[str] = []
        self.loading = ""
        """The image that is being loaded for it."""
        self.kernel_ended = False
        self._began = time.monotonic()
        self._limits = limits
        self._stdout, self._stderr = Text(limits.output_bytes), Text(limits.output_bytes)
        self._result: Text | None = None
        self._error: str | None = None
        self._error_cut = False

    def on_stdout(self, message: OutputMessage) -> None:
        """A piece of stdout came."""
        self._stdout.add(message.line)

    def on_stderr(self, message: OutputMessage) -> None:
        """A piece of stderr came."""
        self._stderr.add(message.line)

    def on_result(self, result: Result) -> None:
        """Something was displayed, or the value of the last expression came."""
        image = result.png or result.jpeg
        if image:
            if not isinstance(image, str):
                raise TypeError(f"an image is {type(image).__name__}")
            self.encoded.append(image)
        elif result.text is not None and result.is_main_result:
            self._result = Text(self._limits.output_bytes)
            self._result.add(result.text)
        elif result.text is not None:
            self._stdout.add(result.text)
            self._stdout.add("\n")

    def on_error(self, error: ExecutionError) -> None:
        """The code ended with an exception, or with its process."""
        if error.name in _KERNEL_ENDED and not error.traceback:
            self.kernel_ended = True
            return
        self.fail(_COLOURS.sub("", str(error.traceback or "")) or f"{error.name}: {error.value}")

    def fail(self, traceback: str) -> None:
        """The code failed, or could not be started."""
        encoded = traceback.encode("utf-8", "replace")
        # The end says what went wrong.
        kept = encoded[-self._limits.output_bytes :]
        self._error, self._error_cut = kept.decode("utf-8", "ignore"), len(kept) < len(encoded)

    def execution(self, status: ExecutionStatus | None = None, reason: str = "") -> Execution:
        """What became of it; without a status, `ok` or `error` by what came."""
        error = self._error if status is None else None
        return Execution(
            status=status or ("error" if error is not None else "ok"),
            stdout=str(self._stdout),
            stderr=str(self._stderr),
            traceback=error or "",
            result=None if self._result is None else str(self._result),
            images=self.images,
            notes=tuple(self.notes),
            reason=reason,
            seconds=time.monotonic() - self._began,
            truncated=self._stdout.dropped
            or self._stderr.dropped
            or self._error_cut
            or (self._result is not None and self._result.dropped),
        )


_MAX_FILE_BYTES = 16 << 20
_MAX_NOTE = 500


def image_file(name: str, image: InputImage) -> tuple[bytes | None, str]:
    """Return the image as a PNG file; or `None`, and why it is not there."""
    loaded, note = load_or_say(name, image)
    if loaded is None:
        return None, note
    file = BytesIO()
    loaded.save(file, "PNG", compress_level=1)
    return file.getvalue(), ""


def binding(name: str, path: str) -> str:
    """Code that binds a name to the image in a file, and no other name."""
    return f"{name} = __import__('PIL.Image', fromlist=['open']).open({path!r}).copy()"


def shown_images(encoded: Sequence[str], limits: SandboxLimits) -> tuple[tuple[ShownImage, ...], list[str]]:
    """Return the images that the code showed, and notes of those that are missing or smaller."""
    shown: list[ShownImage] = []
    notes: list[str] = []
    for number, text in enumerate(encoded[: limits.images], 1):
        try:
            image, smaller = _shown(text, limits)
        except (InputError, MissingDependencyError, ValueError) as error:
            notes.append(f"An image can't be shown: {error}"[:_MAX_NOTE])
            continue
        shown.append(image)
        if smaller:
            notes.append(f"Image {number} is shown smaller than it is: {smaller} pixels.")
    if len(encoded) > limits.images:
        left_out = len(encoded) - limits.images
        notes.append(f"{left_out} more not shown: a call shows at most {limits.images} images.")
    return tuple(shown), notes


def _shown(text: str, limits: SandboxLimits) -> tuple[ShownImage, str]:
    from metis_agent.tools.images import ImageRules, load_image

    rules = ImageRules(max_bytes=_MAX_FILE_BYTES)
    image = load_image(b64decode("".join(text.split()), validate=True), rules).convert("RGB")
    pixels = image.width * image.height
    if pixels <= limits.image_pixels:
        return encode_image(image), ""
    before = f"{image.width} x {image.height}"
    scale = (limits.image_pixels / pixels) ** 0.5
    image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
    return encode_image(image), f"{image.width} x {image.height} instead of {before}"


MOST_BYTES = 16 << 20
"""Of one answer; one message of the code's output, base64 images included, may be all of it."""

_SPARE_SECONDS = 5.0
_BAD_GATEWAY = 502
# What a message can raise that is not as the protocol has it: the code may have written it.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class FloodError(Exception):
    """The answer went on beyond `MOST_BYTES`."""


class BrokenAnswerError(Exception):
    """The answer is not one of the protocol's."""


class NotRunningError(Exception):
    """The remote sandbox is not running, so the code was not run: it ended, or is paused."""


class SandboxDiedError(Exception):
    """The remote sandbox ended under the call."""


class UnreachableError(Exception):
    """No connection was made, so nothing was sent."""


class RemoteSandbox(AsyncSandbox):
    """One remote sandbox; its calls come one after another."""

    _exchange: Exchange | None = None

    @property
    def _client(self) -> httpx.AsyncClient:
        client = super()._client
        if self._exchange is not None:
            client._transport = _Watched(client._transport, self._exchange)
        return client

    async def execute(self, code: str, call: Call, seconds: float) -> None:
        """Run code, and put what comes back into `call`.

        Raises:
            FloodError, BrokenAnswerError, NotRunningError, SandboxDiedError, UnreachableError: see there.
            InfrastructureError: anything else that the service or the network did.
        """
        exchange = self._exchange = call.exchange = Exchange()
        try:
            await self.run_code(
                code,
                on_stdout=call.on_stdout,
                on_stderr=call.on_stderr,
                on_result=call.on_result,
                on_error=call.on_error,
                timeout=seconds + _SPARE_SECONDS,
                request_timeout=seconds + _SPARE_SECONDS,
            )
        except FloodError:
            raise
        except _MALFORMED as error:
            raise BrokenAnswerError(f"{type(error).__name__}: {error}"[:200]) from error
        except SandboxNotRunningException as error:
            raise NotRunningError(str(error)) from error
        except (TimeoutException, NotFoundException) as error:
            if exchange.status == _BAD_GATEWAY or isinstance(error, NotFoundException):
                raise NotRunningError(str(error)) from error
            raise SandboxDiedError(str(error)) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(str(error)) from error
        except Exception as error:
            raise translated(error) from error
        finally:
            self._exchange = None
        if not exchange.finished:
            raise SandboxGoneError("E2B's answer ended before the code did; what it had computed is lost.")

    async def upload(self, path: str, content: bytes) -> str:
        """Write a file, relative to the home folder; gives its full path.

        Raises:
            NotRunningError, UnreachableError, InfrastructureError: as for `execute`.
        """
        try:
            return (await self.files.write(path, content)).path
        except (SandboxNotRunningException, SandboxNotFoundException) as error:
            raise NotRunningError(str(error)) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(str(error)) from error
        except Exception as error:
            raise translated(error) from error


def translated(error: Exception) -> InfrastructureError:
    """What an error of the SDK means to a caller; the key is in none of the messages."""
    said = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, InfrastructureError):
        return error
    if isinstance(error, AuthenticationException):
        return SandboxUnavailableError(
            f"E2B refused the key ({said}). Set E2B_API_KEY to a valid one; keys are at https://e2b.dev/dashboard."
        )
    if isinstance(error, SandboxNotFoundException):
        return SandboxGoneError(f"the E2B sandbox has ended ({said}).")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return SandboxGoneError(f"E2B can't be reached ({said}). Check the network, its proxy and E2B_DOMAIN.")
    return SandboxGoneError(f"E2B failed just now ({said}).")


class _Watched(httpx.AsyncBaseTransport):
    """Notes the head of an answer, and counts its body."""

    def __init__(self, inner: httpx.AsyncBaseTransport, exchange: Exchange) -> None:
        self._inner, self._exchange = inner, exchange

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        self._exchange.status = response.status_code
        if isinstance(response.stream, httpx.AsyncByteStream):
            response.stream = _Counted(response.stream, self._exchange)
        return response

    # The SDK's clients share the transport below, so it is never closed with one of them.


@dataclass
class _Counted(httpx.AsyncByteStream):
    inner: httpx.AsyncByteStream
    exchange: Exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.inner:
            self.exchange.see(chunk)
            if self.exchange.received > MOST_BYTES:
                raise FloodError
            yield chunk

    async def aclose(self) -> None:
        await self.inner.aclose()
