"""What the code prints: a fixed piece of memory shared with the host, so no amount of output leaves it.

The session writes, the host reads once the call is over, or when its time is: text printed before a
timeout is not lost. Layout: four 64-bit counters (bytes kept and bytes dropped of stdout, then of stderr),
the stdout region, the stderr region.
"""

import io
import mmap
import os
import struct
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Screen", "read_screen", "screen_size"]

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
    """In the session: two text streams over the shared memory."""

    def __init__(self, fd: int, capacity: int) -> None:
        self._memory = mmap.mmap(fd, screen_size(capacity))
        self._regions = [_Region(self._memory, index, capacity) for index in (0, 1)]
        self.stdout, self.stderr = (self._stream(region) for region in self._regions)

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

    def __init__(self, memory: mmap.mmap, index: int, capacity: int) -> None:
        self._memory, self._index, self._capacity = memory, index, capacity
        self._start = _COUNTERS.size + index * capacity
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
