"""A session's side of the conversation: read a call, run it, answer."""

import os
import socket
from collections.abc import Callable, Sequence

from .repl import Repl
from .screen import Screen
from .wire import FrameError, pack_frame, pack_parts, read_frame, unpack_parts

__all__ = ["MAX_CODE_BYTES", "announce", "serve"]

MAX_CODE_BYTES = 1 << 20
"""The longest code that a call may bring, in bytes of UTF-8."""


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


def serve(stream: socket.socket, screen: Screen, capacity: int) -> None:
    """Answer calls until the host hangs up.

    Args:
        stream: the host's stream.
        screen: where prints go.
        capacity: the most bytes of traceback, and of result, that an answer carries.
    """
    repl = Repl(screen.stdout, screen.stderr)
    while True:
        try:
            number, payload = read_frame(stream.recv, MAX_CODE_BYTES + 64)
        except (EOFError, OSError, FrameError):
            return
        screen.clear()
        code = unpack_parts(payload)[b"c"].decode("utf-8", "replace")
        finished, error, result = repl.run(code)
        parts = {b"s": b"o" if finished else b"e"}
        for tag, text in ((b"e", error), (b"r", result)):
            if text is not None:
                body = text.encode("utf-8", "backslashreplace")
                parts[tag] = body[:capacity]
                if len(body) > capacity:
                    parts[b"t"] = b"1"
        stream.sendall(pack_frame(number, pack_parts(parts)))
