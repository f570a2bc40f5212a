"""The two message formats between host and sandbox; sizes are checked on reading, by whoever reads.

A *frame* on a session's stream: call number, length, payload. A payload is a list of tagged *parts*, so a
later part (a picture, a file) needs no new format. What comes from a session was possibly forged by the
code in it: a reader takes at most `limit` bytes and treats every byte as data.
"""

import struct
from collections.abc import Callable, Mapping

__all__ = ["FrameError", "pack_frame", "pack_parts", "read_frame", "unpack_parts"]

_FRAME = struct.Struct("!QI")
_PART = struct.Struct("!cI")


class FrameError(Exception):
    """The other side sent something that is not a frame, or one over the limit."""


def pack_frame(number: int, payload: bytes) -> bytes:
    """A frame as bytes."""
    return _FRAME.pack(number, len(payload)) + payload


def read_frame(receive: Callable[[int], bytes], limit: int) -> tuple[int, bytes]:
    """The next frame: its call number and payload.

    Args:
        receive: gives at least one and at most the asked number of bytes, or none at the end.
        limit: the longest payload taken, in bytes.

    Raises:
        EOFError: the stream ended.
        FrameError: the frame says that it is longer than `limit`.
    """
    number, length = _FRAME.unpack(_exactly(receive, _FRAME.size))
    if length > limit:
        raise FrameError(f"a frame of {length} bytes, over the limit of {limit}")
    return number, _exactly(receive, length)


def pack_parts(parts: Mapping[bytes, bytes]) -> bytes:
    """Parts, by their one-byte tag, as a payload."""
    return b"".join(_PART.pack(tag, len(body)) + body for tag, body in parts.items())


def unpack_parts(payload: bytes) -> dict[bytes, bytes]:
    """The parts of a payload by tag; a repeated tag keeps its last part.

    Raises:
        FrameError: a part runs past the end.
    """
    parts, position = {}, 0
    while position < len(payload):
        start = position + _PART.size
        if start > len(payload):
            raise FrameError("a part without a whole header")
        tag, length = _PART.unpack_from(payload, position)
        position = start + length
        if position > len(payload):
            raise FrameError(f"a part of {length} bytes runs past the end of its frame")
        parts[tag] = payload[start:position]
    return parts


def _exactly(receive: Callable[[int], bytes], count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = receive(min(count - len(received), 1 << 16))
        if not piece:
            raise EOFError("the stream ended inside a frame" if received else "the stream ended")
        received += piece
    return bytes(received)
