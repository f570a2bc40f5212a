"""A session's side of the conversation: read a call, run it, answer."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .pictures import Pictures
from .repl import Repl
from .screen import Screen
from .wire import FrameError, pack_frame, pack_parts, pack_pictures, read_frame, unpack_parts

__all__ = ["MAX_CODE_BYTES", "AnswerLimits", "announce", "serve"]

MAX_CODE_BYTES = 1 << 20
"""The longest code that a call may bring, in bytes of UTF-8."""

_MAX_REQUEST_BYTES = (1 << 32) - 1


class AnswerLimits(NamedTuple):
    """How much an answer carries."""

    text: int
    """Bytes of traceback, of result, and of notes, each."""
    pictures: int
    pixels: int
    """Of each picture."""


def announce(stream: socket.socket, prepare: Callable[[], None], descriptors: Sequence[int] = ()) -> bool:
    """Run the preparation and tell the host how it went, handing it `descriptors`.

    Returns:
        Whether the session may go on.
    """
    try:
        prepare()
    except Exception as error:
        stream.sendall(f"failed: {type(error).__name__}: {error}".encode())
        return False
    socket.send_fds(stream, [b"ready"], descriptors)
    for fd in descriptors:
        os.close(fd)
    return True


def serve(stream: socket.socket, screen: Screen, limits: AnswerLimits) -> None:
    """Take pictures and answer calls until the host hangs up.

    Args:
        stream: the host's stream.
        screen: where prints go.
        limits: of an answer.
    """
    pictures = Pictures(limits.pictures, limits.pixels)
    repl = Repl(screen.stdout, screen.stderr, pictures)
    while True:
        try:
            number, payload = read_frame(stream.recv, _MAX_REQUEST_BYTES)
        except MemoryError:
            pictures.did_not_fit()
            continue
        except (EOFError, OSError, FrameError):
            return
        parts = unpack_parts(payload)
        if b"i" in parts:
            name = str(parts[b"n"], "utf-8")
            pictures.place(repl.names, name, str(parts[b"m"], "ascii"), parts[b"i"])
            # The next picture should find the memory of this frame free.
            del payload, parts
            continue
        screen.clear()
        pictures.begin()
        finished, error, result = repl.run(str(parts[b"c"], "utf-8", "replace"))
        stream.sendall(pack_frame(number, pack_parts(_answer(finished, error, result, pictures, limits))))


def _answer(
    finished: bool, error: str, result: str | None, pictures: Pictures, limits: AnswerLimits
) -> dict[bytes, bytes]:
    parts = {b"s": b"o" if finished else b"e"}
    for tag, text in ((b"e", error), (b"r", result), (b"n", "\n".join(pictures.notes) or None)):
        if text is not None:
            body = text.encode("utf-8", "backslashreplace")
            parts[tag] = body[: limits.text]
            if len(body) > limits.text:
                parts[b"t"] = b"1"
    if pictures.taken:
        parts[b"p"] = pack_pictures(pictures.taken)
    return parts
