"""Parts of an export sorted by the trace they belong to, on disk: memory holds one trace at a time.

An export has the spans of a trace wherever the collector put them. So each part is appended to one of a fixed number
of files by a hash of its key, as the export is read; then each file is grouped by an index of its keys alone, and its
traces are read one after another. Both passes read and write in order, so the time is linear in the export.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metis_agent.traces.values import parse_json

__all__ = ["Spool", "shelves_for"]

_BYTES_A_FILE = 48 * 2**20
_MOST_FILES = 256
_LARGEST = 2**28
_BUFFER = 2**18


def shelves_for(size: int) -> int:
    """Return how many files an export of so many bytes is spread over."""
    return max(1, min(_MOST_FILES, size // _BYTES_A_FILE + 1))


class Spool:
    """A folder of files `0`, `1`, ...: lines of key, tab, JSON.

    Args:
        folder: where they are; made where it isn't there.
        files: how many.
        sizes: how long each is that a stopped import has vouched for; what comes after is cut off.
    """

    def __init__(self, folder: Path, files: int, sizes: list[int] | None = None) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._files = []
        for number, size in enumerate(sizes or [0] * files):
            file = open(folder / str(number), "ab", buffering=_BUFFER)  # noqa: SIM115 - closed by `close`
            file.truncate(size)
            file.seek(0, os.SEEK_END)
            self._files.append(file)

    def add(self, key: str, part: Mapping[str, Any] | bytes) -> None:
        """Append a part, given as JSON or as what becomes JSON."""
        raw = part if isinstance(part, bytes) else json.dumps(part, default=str, separators=(",", ":")).encode()
        name = key.replace("\t", " ").replace("\n", " ").encode("utf-8", "replace")
        shelf = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big") % len(self._files)
        self._files[shelf].write(b"%s\t%s\n" % (name, raw.strip().replace(b"\n", b" ").replace(b"\r", b" ")))

    def flush(self) -> list[int]:
        """Write what waits in memory, and return each file's size."""
        for file in self._files:
            file.flush()
        return [file.tell() for file in self._files]

    def groups(self, number: int) -> Iterator[tuple[str, list[Any] | None]]:
        """Yield each key of a file with its parts in the order they were added; keys in the order they came up.

        Parts are `None` where together they are over 256 MiB: no run is, and memory has a bound.
        """
        places: dict[bytes, list[int]] = {}
        sizes: Counter[bytes] = Counter()
        with open(self._folder / str(number), "rb") as file:
            place = 0
            for line in file:
                key = line[: line.index(b"\t")]
                places.setdefault(key, []).append(place)
                sizes[key] += len(line)
                place += len(line)
            for key, starts in places.items():
                if sizes[key] > _LARGEST:
                    yield key.decode("utf-8", "replace"), None
                    continue
                parts = []
                for start in starts:
                    file.seek(start)
                    parts.append(parse_json(file.readline().partition(b"\t")[2]))
                yield key.decode("utf-8", "replace"), parts

    def close(self) -> None:
        """Close the files; they stay."""
        for file in self._files:
            file.close()

    def remove(self) -> None:
        """Close and remove the files."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
