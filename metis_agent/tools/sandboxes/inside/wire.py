"""What passes between host and sandbox: frames, and the memory that holds what the code prints.

A *frame* on a session's stream: call number, length, payload. A payload is a list of tagged *parts*, so a
later part needs no new format. A *picture* is a part that holds a size and bare pixels. What comes from a session
was possibly forged by the code in it: a reader takes at most `limit` bytes and treats every byte as data.

To a session go `i`, a picture, with its name `n` and mode `m`, any number of times, then `c`, code. Back come `s`,
whether the code ended well, `e`, a traceback, `r`, a result, `t` where one of these was cut, `p`, pictures in RGB,
and `n`, notes about pictures, one a line.

The *screen* is a fixed piece of shared memory, so no amount of output leaves it. The session writes; the host reads
once the call is over, or when its time is: text printed before a timeout is not lost. Layout: four 64-bit counters
(bytes kept and bytes dropped of stdout, then of stderr), the stdout region, the stderr region.
"""

import io
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "HANDLE",
    "LONGEST_SIDE",
    "MAX_CODE_BYTES",
    "AnswerLimits",
    "FrameError",
    "Picture",
    "Screen",
    "Terms",
    "pack_frame",
    "pack_input",
    "pack_parts",
    "pack_pictures",
    "pictures_size",
    "read_frame",
    "read_screen",
    "screen_size",
    "unpack_parts",
    "unpack_picture",
    "unpack_pictures",
    "unpack_terms",
]

MAX_CODE_BYTES = 1 << 20
"""The longest code that a call may bring, in bytes of UTF-8."""

HANDLE = b"p"
"""With it a session sends a descriptor of its process, first of all."""

LONGEST_SIDE = 4096
"""Of a picture that comes from a session, in pixels."""

Picture = tuple[int, int, memoryview | bytes]
"""Width, height, and pixels row by row."""

_FRAME = struct.Struct("!QI")
_PART = struct.Struct("!cI")
_SIZE = struct.Struct("!II")
_TERMS = struct.Struct("!7Q")
_MOST_PARTS = 8


class AnswerLimits(NamedTuple):
    """How much an answer carries."""

    text: int
    """Bytes of traceback, of result, and of notes, each."""
    pictures: int
    pixels: int
    """Of each picture."""


class Terms(NamedTuple):
    """Of a session to open: numbers for its containment, in bytes where they are sizes."""

    memory: int
    """Of address space."""
    disk: int
    threads: int
    tasks: int
    """Of all of its user, where the kernel counts no session alone."""
    text: int
    """This and the rest as in `AnswerLimits`."""
    pictures: int
    pixels: int

    def pack(self, folder: str) -> bytes:
        """With the name of its folder, as a message to the template."""
        return _TERMS.pack(*self) + folder.encode()


def unpack_terms(message: bytes) -> tuple[Terms, str]:
    """Terms and the name of the folder."""
    return Terms(*_TERMS.unpack_from(message)), message[_TERMS.size :].decode()


class FrameError(Exception):
    """The other side sent something that is not a frame, or one over the limit."""


def pack_frame(number: int, payload: bytes) -> bytes:
    """A frame as bytes."""
    return _FRAME.pack(number, len(payload)) + payload


def read_frame(receive: Callable[[int], bytes], limit: int) -> tuple[int, bytearray]:
    """The next frame: its call number and payload.

    Args:
        receive: gives at least one and at most the asked number of bytes, or none at the end.
        limit: the longest payload taken, in bytes.

    Raises:
        EOFError: the stream ended.
        FrameError: the frame says that it is longer than `limit`.
        MemoryError: it does not fit; it was read all the same.
    """
    number, length = _FRAME.unpack(_exactly(receive, _FRAME.size))
    if length > limit:
        raise FrameError(f"a frame of {length} bytes, over the limit of {limit}")
    return number, _exactly(receive, length)


def pack_parts(parts: Mapping[bytes, bytes]) -> bytes:
    """Parts, by their one-byte tag, as a payload."""
    return b"".join(_PART.pack(tag, len(body)) + body for tag, body in parts.items())


def unpack_parts(payload: bytes | bytearray) -> dict[bytes, memoryview]:
    """The parts of a payload by tag, not copied; a repeated tag keeps its last part.

    Raises:
        FrameError: a part runs past the end, or there are more than any message has.
    """
    parts: dict[bytes, memoryview] = {}
    count, position, view = 0, 0, memoryview(payload)
    while position < len(payload):
        count += 1
        if count > _MOST_PARTS:
            raise FrameError(f"more than {_MOST_PARTS} parts in a frame")
        start = position + _PART.size
        if start > len(payload):
            raise FrameError("a part without a whole header")
        tag, length = _PART.unpack_from(payload, position)
        position = start + length
        if position > len(payload):
            raise FrameError(f"a part of {length} bytes runs past the end of its frame")
        parts[tag] = view[start:position]
    return parts


def pack_input(number: int, name: str, mode: str, picture: Picture) -> tuple[bytes, memoryview | bytes]:
    """The frame of a picture for a session, in two pieces: pixels are many, and so not copied."""
    width, height, pixels = picture
    size = _SIZE.pack(width, height)
    parts = pack_parts({b"n": name.encode(), b"m": mode.encode()}) + _PART.pack(b"i", len(size) + len(pixels)) + size
    return _FRAME.pack(number, len(parts) + len(pixels)) + parts, pixels


def unpack_picture(part: memoryview) -> Picture:
    """A picture of any mode, from the host."""
    return *_SIZE.unpack_from(part), part[_SIZE.size :]


def pack_pictures(pictures: Iterable[Picture]) -> bytes:
    """Pictures in RGB as one part."""
    return b"".join(piece for width, height, pixels in pictures for piece in (_SIZE.pack(width, height), pixels))


def pictures_size(most: int, pixels: int) -> int:
    """Bytes that `most` pictures in RGB, of at most `pixels` pixels each, take."""
    return most * (_SIZE.size + 3 * pixels)


def unpack_pictures(part: memoryview, *, most: int, pixels: int) -> list[Picture]:
    """At most `most` pictures in RGB, each of at most `pixels` pixels.

    Raises:
        FrameError: it is something else.
    """
    pictures: list[Picture] = []
    while part:
        if len(part) < _SIZE.size or len(pictures) == most:
            raise FrameError("more pictures than were asked for, or half of one")
        width, height = _SIZE.unpack_from(part)
        end = _SIZE.size + 3 * width * height
        if not (0 < width <= LONGEST_SIDE and 0 < height <= LONGEST_SIDE and width * height <= pixels):
            raise FrameError(f"a picture of {width} x {height} pixels")
        if end > len(part):
            raise FrameError("a picture with too few pixels")
        pictures.append((width, height, part[_SIZE.size : end]))
        part = part[end:]
    return pictures


def _exactly(receive: Callable[[int], bytes], count: int) -> bytearray:
    received, left, full = bytearray(), count, False
    while left:
        piece = receive(min(left, 1 << 16))
        if not piece:
            raise EOFError("the stream ended inside a frame" if left < count else "the stream ended")
        left -= len(piece)
        try:
            received += b"" if full else piece
        except MemoryError:
            # What follows is read all the same, so that the next frame is found.
            received, full = bytearray(), True
    if full:
        raise MemoryError
    return received


_COUNTERS = struct.Struct("=QQQQ")


def screen_size(capacity: int) -> int:
    """Bytes of shared memory for `capacity` bytes of stdout and as many of stderr."""
    return _COUNTERS.size + 2 * capacity


def read_screen(fd: int, capacity: int) -> tuple[bytes, bytes, bool]:
    """On the host: stdout, stderr, and whether anything was dropped. The counters may be forged."""
    counters = os.pread(fd, _COUNTERS.size, 0)
    if len(counters) < _COUNTERS.size:
        return b"", b"", False
    kept_out, dropped_out, kept_error, dropped_error = _COUNTERS.unpack(counters)
    texts = []
    for start, kept in ((0, kept_out), (capacity, kept_error)):
        texts.append(os.pread(fd, min(kept, capacity), _COUNTERS.size + start) if kept else b"")
    return texts[0], texts[1], bool(dropped_out or dropped_error)


class Screen:
    """In the session: two text streams, which can be written to once they are attached to the shared memory."""

    def __init__(self) -> None:
        self._regions = [_Region(index) for index in (0, 1)]
        self.stdout, self.stderr = (self._stream(region) for region in self._regions)

    def attach(self, fd: int, capacity: int) -> None:
        """Show what is written here from now on; -1 for nobody."""
        memory = mmap.mmap(fd, screen_size(capacity))
        for region in self._regions:
            region.attach(memory, capacity)

    def clear(self) -> None:
        """Forget what earlier calls printed."""
        for region in self._regions:
            region.clear()

    @staticmethod
    def _stream(region: "_Region") -> TextIO:
        # A raw stream stands in for a buffered one: with write_through, only its `write` is called.
        buffer = cast("BinaryIO", region)
        return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", write_through=True)


class _Region(io.RawIOBase):
    """One stream's bytes: the first `capacity` are kept, the rest counted."""

    def __init__(self, index: int) -> None:
        self._index = index

    def attach(self, memory: mmap.mmap, capacity: int) -> None:
        self._memory, self._capacity = memory, capacity
        self._start = _COUNTERS.size + self._index * capacity
        self._kept = self._dropped = 0

    def clear(self) -> None:
        self._kept = self._dropped = 0
        self._publish()

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        view = memoryview(data).cast("B")
        taken = min(len(view), self._capacity - self._kept)
        if taken:
            at = self._start + self._kept
            self._memory[at : at + taken] = view[:taken]
        self._kept += taken
        self._dropped += len(view) - taken
        self._publish()
        return len(view)

    def _publish(self) -> None:
        struct.pack_into("=QQ", self._memory, 16 * self._index, self._kept, self._dropped)
