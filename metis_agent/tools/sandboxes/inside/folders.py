"""Folders: who may enter one, and removing one that code may have filled to spite whoever removes it."""

import contextlib
import os
import stat

__all__ = ["everyone_may_enter", "remove_folder"]


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
