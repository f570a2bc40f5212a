"""What a session can import: loaded once before the fork, or found later on paths that it may read.

Below, on folders: who may enter one, and removing one that code may have filled to spite its removal.
"""

import builtins
import contextlib
import importlib
import os
import random
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from typing import Any

__all__ = [
    "REHEARSALS",
    "add_site_folders",
    "be_like_a_console",
    "everyone_may_enter",
    "remove_folder",
    "reroute",
    "seeders",
    "warm",
]

REHEARSALS = 10
"""The interpreter learns what a line does from the first times that it runs: best before the fork."""

# fmt: off
_STANDARD = (
    "math", "cmath", "json", "re", "datetime", "calendar", "time", "collections", "itertools", "functools",
    "operator", "statistics", "fractions", "decimal", "numbers", "random", "string", "textwrap", "heapq", "bisect",
    "copy", "dataclasses", "enum", "typing", "io", "ast", "inspect", "linecache", "traceback", "unicodedata",
    "base64", "hashlib", "csv", "pprint", "contextlib", "warnings", "pathlib", "threading", "signal", "logging",
)
# fmt: on


def add_site_folders(folders: Iterable[str]) -> None:
    """Make the installed packages importable; their `.pth` files are not run."""
    sys.path.extend(folder for folder in folders if folder not in sys.path)


def warm(packages: Iterable[str]) -> None:
    """Import the usual modules, and those of the optional packages that are there."""
    for name in _STANDARD:
        importlib.import_module(name)
    if sys.platform == "linux":
        # The packages' own; see `template._BOOT` on the host.
        os.register_at_fork = importlib.import_module("posix").register_at_fork
    loaded = []
    for name in packages:
        before = set(sys.modules)
        try:
            importlib.import_module(name)
            loaded.append(name)
        except Exception:
            # A broken package is the same as an absent one here: the code that imports it gets the error. What
            # can't be imported here may well be in a session, which has a folder to write to; but not from a half.
            for half in set(sys.modules) - before:
                del sys.modules[half]
    with contextlib.suppress(Exception):
        if "numpy" in loaded:
            importlib.import_module("numpy.random")
        if "PIL" in loaded:
            importlib.import_module("PIL.Image").preinit()


def be_like_a_console() -> None:
    """Small things that code expects of a console, or that the sandbox would break."""
    sitebuiltins = importlib.import_module("_sitebuiltins")
    for name in ("exit", "quit"):
        setattr(builtins, name, sitebuiltins.Quitter(name, ""))
    builtins.input = _no_input
    # Modes and times can't be set here; copying a file should still work.
    vars(shutil).update(copymode=_copy_nothing, copystat=_copy_nothing)


def reroute(folders: Iterable[str]) -> list[int]:
    """Keep folders importable that the session's uid can't reach, such as an interpreter under `/root`.

    They are opened now and entered later through `/proc/self/fd`, which needs no right on their parents.

    Returns:
        The descriptors that must stay open.
    """
    routes, descriptors = {}, []
    for folder in folders:
        if os.path.isdir(folder) and not everyone_may_enter(folder):
            descriptors.append(os.open(folder, os.O_PATH | os.O_DIRECTORY))
            routes[folder] = f"/proc/self/fd/{descriptors[-1]}"
    if routes:
        sys.path[:] = [_routed(entry, routes) for entry in sys.path]
        for module in list(sys.modules.values()):
            path = getattr(module, "__path__", None)
            if isinstance(path, list):
                path[:] = [_routed(entry, routes) for entry in path]
        sys.path_importer_cache.clear()
        importlib.invalidate_caches()
    return descriptors


def seeders() -> list[tuple[Callable[[int], object], int]]:
    """What to call before each fork, with so many random bytes: sessions must not draw the same random numbers."""
    # `random.seed` itself does more, for seeds of other kinds, and a fork copies what it touches.
    instance: Any = vars(random)["_inst"]
    instance.gauss_next = None
    found: list[tuple[Callable[[int], object], int]] = [(super(random.Random, instance).seed, 32)]
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        found.append((numpy_random.seed, 4))  # an integer is by far the cheapest of its ways
    return found


def _routed(entry: str, routes: dict[str, str]) -> str:
    for folder, route in routes.items():
        if entry == folder or entry.startswith(folder + os.sep):
            return route + entry[len(folder) :]
    return entry


def _no_input(prompt: object = "", /) -> str:
    raise EOFError("input() has nobody to ask here; assign the value in the code instead")


def _copy_nothing(source: object, destination: object, *, follow_symlinks: bool = True) -> None:
    return None


def everyone_may_enter(folder: str) -> bool:
    """Whether any uid may pass through this folder and all above it, by their permissions."""
    while True:
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        parent = os.path.dirname(folder)
        if parent == folder:
            return True
        folder = parent


def remove_folder(path: str) -> None:
    """Remove a folder and all in it; what can't be removed is left, never an error.

    Unlike `shutil.rmtree` it neither recurses nor builds long paths: each folder found is first moved up
    beside the top one, so a tree a thousand levels deep, or without permissions, goes as well.
    """
    waiting, count = [path], 0
    while waiting:
        folder = waiting.pop()
        try:
            os.chmod(folder, stat.S_IRWXU)
            with os.scandir(folder) as entries:
                found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue
        for entry, is_folder in found:
            with contextlib.suppress(OSError):
                if is_folder:
                    count += 1
                    moved = f"{path}.{count}"
                    os.chmod(entry, stat.S_IRWXU)
                    os.rename(entry, moved)
                    waiting.append(moved)
                else:
                    os.unlink(entry)
        with contextlib.suppress(OSError):
            os.rmdir(folder)
