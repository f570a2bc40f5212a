"""Records of files, read as a stream and sorted by trace, one at a time in memory.

JSONL, JSON documents, Parquet; plain, compressed, in a zip, from any fsspec URL. A record is one line, one element of a
document's array, or one row. None is gathered up beyond the limit, and what is no record comes as `BadRecord` in its
place, so that nothing is lost silently.

An export has the spans of a trace wherever the collector put them. So each part is appended to one of a fixed number
of files by a hash of its key, as the export is read; then each file is grouped by an index of its keys alone, and its
traces are read one after another. Both passes read and write in order, so the time is linear in the export.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import fsspec

from metis_agent.errors import InputError, MissingDependencyError, StorageError
from metis_agent.recording.shards import Storage
from metis_agent.traces.values import PAGES, parse_json

__all__ = ["BadRecord", "Record", "Spool", "expanded", "records_of", "shelves_for", "size_of"]

LONGEST = 64 * 2**20
"""Bytes that one record may take."""
_BLOCK = _START = 2**20
_SIGNS = re.compile(rb'["\\\[\]{}]')
_QUOTE, _BACKSLASH, _OPENING, _CLOSING = ord('"'), ord("\\"), b"[{", b"]}"
_ALONE, _IN_ARRAY, _IN_KEYED_ARRAY = (), (ord("["),), (ord("{"), ord("["))
_KEYED = re.compile(
    rb'\{(?:\s*"[^"\\]*"\s*:\s*(?:\{[^{}\[\]]*\}|[^{}\[\]",]+|"[^"\\]*")\s*,)*'
    rb'\s*"(resourceSpans|resourceLogs|%s)"\s*:\s*\[' % "|".join(PAGES).encode()
)
_PACKED: Mapping[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UNREADABLE = {b"\x28\xb5\x2f\xfd": "compressed with zstd", b"ustar": "a tar archive", b"7z\xbc\xaf": "a 7z archive"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record as it was read."""

    number: int
    """Its place in the file, from 1."""
    value: Mapping[str, Any]
    raw: bytes | None = None
    """Its JSON, where the file has it on a line of its own."""


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """What stands in a record's place and is none."""

    number: int
    reason: str
    raw: bytes = b""
    """Its beginning."""


def expanded(paths: list[str]) -> list[str]:
    """Return the files that paths, folders, patterns and URLs name, in order.

    Raises:
        StorageError: one names nothing, or can't be reached.
        ConfigurationError: a URL's file system is unknown, or its package isn't installed.
    """
    found: list[str] = []
    for path in paths:
        place = Storage(path)
        fs, root = place.fs, place.root
        try:
            if fs.isdir(root):
                names = [name for name in fs.find(root) if _is_readable(name)]
            else:
                names = fs.glob(root) if any(sign in root for sign in "*?[") else [root] if fs.exists(root) else []
        except Exception as error:  # each file system has exceptions of its own
            raise StorageError(f"{path!r} can't be read: {error}. Check the address.") from error
        if not names:
            raise StorageError(
                f"{path!r} names no file with traces; give a file, a folder, a pattern or an fsspec URL."
            )
        for name in sorted(names):
            found += _members(fs.unstrip_protocol(name) if "://" in path else name)
    return found


def _members(path: str) -> list[str]:
    """The files of traces in a zip; any other file is one itself."""
    if not path.lower().endswith(".zip"):
        return [path]
    try:
        inside = sorted(fsspec.filesystem("zip", fo=path).find(""))
    except Exception as error:  # no zip, or a file system with exceptions of its own
        raise StorageError(f"{path!r} can't be read as a zip: {error}.") from error
    names = [name for name in inside if _is_readable(name)]
    if not names:
        raise StorageError(f"{path!r} has no file with traces in it, only {inside[:8]!r}; unpack what is packed twice.")
    return [f"zip://{name}::{path}" for name in names]


def size_of(path: str) -> int:
    """Return a file's size in bytes."""
    fs, root = fsspec.core.url_to_fs(path)
    return int(fs.size(root) or 0)


def records_of(path: str, *, skip: int = 0) -> Iterator[Record | BadRecord]:
    """Stream a file's records.

    Args:
        path: a file or an fsspec URL; compression and kind are known by their first bytes.
        skip: how many records to leave out at the beginning, unparsed.

    Raises:
        StorageError: it can't be read.
        MissingDependencyError: it is Parquet and pyarrow is not installed.
    """
    try:
        with _opened(path) as (file, start):
            if start.startswith(b"PAR1"):
                yield from _rows(path, file, skip)
                return
            around, key = _layout(start)
            torn: list[str] = []
            blocks, number = _blocks(file, torn), 0
            for record in _lines(blocks, skip) if around is None else _elements(blocks, around, key, skip):
                number = record.number
                yield record
            if torn:
                yield BadRecord(number=number + 1, reason=f"the {torn[0]} breaks off here: a half-written export")
    except (OSError, EOFError) as error:
        if isinstance(error, StorageError | MissingDependencyError):
            raise
        raise StorageError(f"{path!r} can't be read: {error}.") from error


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], bytes]]:
    """The file, decompressed, at its beginning, and its first bytes."""
    with fsspec.open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        unpacked = next((opened for sign, opened in _PACKED.items() if head.startswith(sign)), None)
        content: Any = unpacked(file) if unpacked else file
        if head.startswith(_UTF_16):  # as PowerShell's `>` writes
            content = _FromUtf16(file)
        start = b""
        for block in _blocks(content, []):
            start += block
            if len(start) >= _START:
                break
        for sign, what in _UNREADABLE.items():
            if start.startswith(sign) or (sign == b"ustar" and start[257:262] == sign):
                raise StorageError(f"{path!r} is {what}, which is not read: unpack it, or use gzip or zip.")
        content.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        yield content, start


class _FromUtf16:
    """A file in UTF-16, read as UTF-8."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek(0)

    def read(self, size: int) -> bytes:
        while block := self._file.read(size):
            if text := self._decoder.decode(block):
                return text.encode("utf-8", "replace")
        return b""

    def seek(self, _: int) -> None:
        """Back to the beginning."""
        self._file.seek(0)
        self._decoder = codecs.getincrementaldecoder("utf-16")("replace")


def _blocks(file: IO[bytes], torn: list[str]) -> Iterator[bytes]:
    """Yield a file's content; `torn` is added to where a compressed stream breaks off, after what there is of it."""
    read = getattr(file, "read1", file.read)  # `read` would lose what comes before the break
    try:
        while block := read(_BLOCK):
            yield block
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        torn.append(f"{type(file).__name__.removesuffix('File').lower()} stream")


def _layout(start: bytes) -> tuple[tuple[int, ...] | None, str]:
    """In which brackets records stand, and under which key; `None` where each has a line of its own."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    line, _, rest = text.partition(b"\n")
    if text[:1] == b"[":
        return (None if _is_conversation(line, rest) else _IN_ARRAY), ""
    try:
        parse_json(line)
    except InputError as error:
        keyed = _KEYED.match(text)
        if keyed is not None:
            return _IN_KEYED_ARRAY, keyed[1].decode()
        # A torn line among whole ones is JSONL still; objects one after another without any line are not.
        chain = not rest.strip() and "extra data" in str(error) and re.search(rb"\}\s*\{", line)
        return (None, "") if (not rest or rest.startswith(b"{")) and not chain else (_ALONE, "")
    return None, ""


def _is_conversation(line: bytes, rest: bytes) -> bool:
    """Whether a line with an array is one record among lines, a list of messages, and not a document of many."""
    try:
        value = parse_json(line)
    except InputError:
        return False
    if rest.lstrip().startswith(b"["):
        return True
    return isinstance(value, list) and bool(value) and all(
        isinstance(item, Mapping) and ("role" in item or {"type", "data"} <= set(item)) for item in value
    )  # fmt: skip


def _lines(blocks: Iterator[bytes], skip: int) -> Iterator[Record | BadRecord]:
    for number, (line, length) in enumerate(_split(blocks), start=1):
        if number <= skip:
            continue
        if length > LONGEST:
            yield _too_long(number, length, line)
        elif line.strip():
            yield _record(number, line)


def _split(blocks: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
    """Each line without its break, and its length; of one over the limit, the beginning."""
    parts: list[bytes] = []
    length = 0
    for block in blocks:
        *whole, tail = block.split(b"\n")
        for piece in whole:
            yield b"".join((*parts, piece)) if length + len(piece) <= LONGEST else b"".join(parts), length + len(piece)
            parts, length = [], 0
        length += len(tail)
        if length <= LONGEST:
            parts.append(tail)
        elif parts:
            parts = [b"".join(parts)[:1000]]
    if length:
        yield b"".join(parts), length


def _record(number: int, raw: bytes) -> Record | BadRecord:
    try:
        value = parse_json(raw)
    except InputError as error:
        return BadRecord(number=number, reason=f"{error}: a half-written export ends so", raw=raw)
    if not isinstance(value, dict | list):
        return BadRecord(number=number, reason=f"a {type(value).__name__}, no JSON object", raw=raw)
    if isinstance(value, list):
        return Record(number=number, value={"messages": value})
    return Record(number=number, value=value, raw=raw)


def _too_long(number: int, length: int, start: bytes) -> BadRecord:
    return BadRecord(number=number, reason=f"{length:,} bytes; one record may take {LONGEST:,}", raw=start[:1000])


def _elements(blocks: Iterator[bytes], around: tuple[int, ...], key: str, skip: int) -> Iterator[Record | BadRecord]:
    """The elements of the arrays that a document is, or holds at its top, each as it stands."""
    for number, (raw, length) in enumerate(_scanned(blocks, around), start=1):
        if number <= skip:
            continue
        record = _record(number, raw) if length <= LONGEST else _too_long(number, length, raw)
        if isinstance(record, Record) and key.startswith("resource"):
            record = Record(number=number, value={key: [record.value]})
        yield record


def _scanned(blocks: Iterator[bytes], around: tuple[int, ...]) -> Iterator[tuple[bytes, int]]:
    """Each object or array that stands right within these open brackets, and its length."""
    stack: list[int] = []
    kept: list[bytes] = []
    length = 0
    inside = quoted = escaped = False
    for block in blocks:
        begin = position = 0
        while position < len(block):
            if escaped:
                escaped, position = False, position + 1
                continue
            found = _SIGNS.search(block, position)
            if found is None:
                break
            position, sign = found.end(), block[found.start()]
            if quoted:
                escaped, quoted = sign == _BACKSLASH, sign != _QUOTE
            elif sign == _QUOTE:
                quoted = True
            elif sign in _OPENING:
                if not inside and tuple(stack) == around:
                    inside, begin, kept, length = True, found.start(), [], 0
                stack.append(sign)
            elif sign in _CLOSING and stack:
                stack.pop()
                if inside and tuple(stack) == around:
                    yield _gathered(kept, length, block[begin:position])
                    inside = False
        if inside:
            whole, length = _gathered(kept, length, block[begin:])
            kept = [whole]
    if inside:
        yield b"".join(kept), length


def _gathered(kept: list[bytes], length: int, piece: bytes) -> tuple[bytes, int]:
    """What there is of a record, and how long it is; over the limit only its beginning is kept."""
    length += len(piece)
    return (b"".join((*kept, piece)) if length <= LONGEST else b"".join(kept)[:1000]), length


def _rows(path: str, file: IO[bytes], skip: int) -> Iterator[Record | BadRecord]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as missing:
        raise MissingDependencyError(
            f"{path!r} is Parquet, which pyarrow reads. Install it with: pip install 'langgraph-metis[traces]'"
        ) from missing
    number = 0
    try:
        table = ParquetFile(file)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= skip:
                number += rows
                continue
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                for row in batch.to_pylist():
                    number += 1
                    if number > skip:
                        yield Record(number=number, value=row)
    except (ArrowException, ValueError) as error:
        yield BadRecord(number=number + 1, reason=f"no whole Parquet file: {error}")


def _is_readable(name: str) -> bool:
    kinds = {".jsonl", ".json", ".ndjson", ".gz", ".bz2", ".xz", ".parquet"}
    return bool(kinds & {kind.lower() for kind in PurePath(name).suffixes}) and not PurePath(name).name.startswith(
        (".", "_")
    )


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
        self.folder = folder
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

    @staticmethod
    def groups(folder: Path, number: int) -> Iterator[tuple[str, list[Any] | None]]:
        """Yield each key of a file with its parts in the order they were added; keys in the order they came up.

        Parts are `None` where together they are over 256 MiB: no run is, and memory has a bound.
        """
        places: dict[bytes, list[int]] = {}
        sizes: Counter[bytes] = Counter()
        with open(folder / str(number), "rb") as file:
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
        shutil.rmtree(self.folder, ignore_errors=True)
