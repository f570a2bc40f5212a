"""What the host looks at during a call, where the kernel can't hold the limit itself."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

from metis_agent.tools.sandboxes.process import LimitExceededError

__all__ = ["folder_bytes", "pid_of", "watch_session"]

_MAX_FILES_PER_MB = 64


def watch_session(*, pid: int, folder: str | None, disk_mb: int, threads: int | None) -> Callable[[], None]:
    """A check of one session, for `SessionProcess`.

    Args:
        pid: of the session, as the host sees it.
        folder: its work folder, where no mount of its own limits it; else `None`.
        disk_mb: MiB that the folder may hold.
        threads: how many it may run, where its uid is shared and RLIMIT_NPROC can't tell; else `None`.
    """

    def check() -> None:
        if threads is not None and _threads(pid) > threads:
            raise LimitExceededError(f"The code ran more than {threads} threads at once.")
        if folder is not None:
            used, files = folder_bytes(folder, most_files=disk_mb * _MAX_FILES_PER_MB)
            if files > disk_mb * _MAX_FILES_PER_MB:
                raise LimitExceededError(f"The code made more than {disk_mb * _MAX_FILES_PER_MB} files.")
            if used + _deleted_bytes(pid, os.stat(folder).st_dev) > disk_mb << 20:
                raise LimitExceededError(f"The code wrote more than {disk_mb} MB of files.")

    return check


def folder_bytes(folder: str, *, most_files: int) -> tuple[int, int]:
    """Bytes on disk below a folder and the number of entries; stops counting past `most_files`."""
    used = count = 0
    waiting = [folder]
    while waiting and count <= most_files:
        for status, subfolder in _entries(waiting.pop(), most_files - count + 1):
            count += 1
            used += status.st_blocks * 512
            if subfolder is not None:
                waiting.append(subfolder)
    return used, count


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, in this process's namespace; -1 when it is gone."""
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        for line in lines:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _entries(folder: str, most: int) -> Iterator[tuple[os.stat_result, str | None]]:
    try:
        # A folder may have been made without the right to list it.
        if not os.access(folder, os.R_OK | os.X_OK):
            os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, most):
                is_folder = entry.is_dir(follow_symlinks=False)
                yield entry.stat(follow_symlinks=False), entry.path if is_folder else None
    except OSError:
        # It vanished meanwhile.
        return


def _deleted_bytes(pid: int, device: int) -> int:
    """Bytes of files that are deleted, and still open: no folder shows them."""
    used = 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            status = os.stat(f"/proc/{pid}/fd/{name}")
            if status.st_nlink == 0 and status.st_dev == device:
                used += status.st_blocks * 512
    except OSError:
        return used
    return used
