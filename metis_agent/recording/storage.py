"""A folder, wherever it is: local or on any fsspec file system.

What the trajectory store and the image store have in common: list, read in blocks, put a whole file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from metis_agent.errors import ConfigurationError, MissingDependencyError, StorageError
from metis_agent.formats import atomic_write

__all__ = ["Storage"]

_BLOCK = 2**20


class Storage:
    """One folder, named by a path or an fsspec URL.

    Raises:
        ConfigurationError: the URL's file system is unknown.
        MissingDependencyError: it is known, but its package isn't installed.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self._options = dict(storage_options or {})
        if not self.url:
            raise ConfigurationError("a store's address is empty (''); give a folder or an fsspec URL.")
        self.reconnect()

    @property
    def is_local(self) -> bool:
        """True for a folder of this machine, where files can be appended to and renamed."""
        return isinstance(self.fs, LocalFileSystem)

    def reconnect(self) -> None:
        """Take a file system of this process: after a fork the parent's connections can't be used."""
        try:
            fs, root = url_to_fs(self.url, **self._options)
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.url!r} needs a package that isn't installed: {error}. "
                "Install it with pip, or use a local folder."
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{self.url!r} is no place for a store: {error}. "
                "Give a folder or a URL that fsspec knows, such as s3://bucket/runs."
            ) from error
        self.fs = cast(AbstractFileSystem, fs)
        self.root = str(root).rstrip("/")

    def check_exists(self) -> None:
        """Raise StorageError where there is no such folder."""
        try:
            if self.fs.isdir(self.root or "/"):
                return
            reason = "there is no such folder"
        except Exception as error:  # each file system has exceptions of its own
            reason = str(error)
        raise StorageError(f"{self.url!r} can't be read: {reason}. Check the address; a first run makes it.")

    def names(self) -> list[str]:
        """Return the names of the files in the folder, unsorted; none where there is no folder yet."""
        try:
            self.fs.invalidate_cache(self.root)
            return [str(path).rpartition("/")[2] for path in self.fs.ls(self.root or "/", detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:
            raise StorageError(f"{self.url!r} can't be listed: {error}. Check the rights to it.") from error

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield a file's content in blocks of a mebibyte.

        Raises:
            StorageError: it isn't there, or can't be read.
        """
        try:
            with self.fs.open(f"{self.root}/{name}", "rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except Exception as error:
            raise StorageError(f"{name!r} in {self.url!r} can't be read: {error}.") from error

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, `None` where it isn't there."""
        try:
            return int(self.fs.size(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise StorageError(f"{name!r} in {self.url!r} can't be read: {error}.") from error

    def put(self, name: str, content: bytes) -> None:
        """Write a whole file, so that a reader sees all of it or none.

        Raises:
            StorageError: it could not be written.
        """
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            if self.is_local:
                atomic_write(Path(self.root) / name, content)
            else:
                self.fs.pipe_file(f"{self.root}/{name}", content)  # object stores put whole or not at all
        except Exception as error:
            raise StorageError(
                f"{name!r} can't be written to {self.url!r}: {error}. "
                "Check the address, the rights to it, and that there is room."
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file, where the rights to it allow that."""
        with suppress(Exception):
            self.fs.rm_file(f"{self.root}/{name}")
