"""What this machine has to offer a sandbox, and what the host watches where the kernel can't hold a limit itself.

It offers paths to read, uids to spare, the bare environment. It watches threads and files during a call. Files are
counted as they are taken from the disk: every inode once, whatever it is called, folders too, and those that no folder
shows any more because they are deleted, and still open or mapped. The process stands still meanwhile, so it can't move
files out of sight.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import site
import sys
import sysconfig
from collections.abc import Iterator
from typing import Protocol

__all__ = [
    "LimitExceededError",
    "Watch",
    "Watched",
    "bare_environment",
    "folder_bytes",
    "inside_folder",
    "interpreter",
    "pid_of",
    "readable_paths",
    "site_folders",
    "spare_uids",
    "tasks_of_user",
]

_LIBRARIES = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/usr/share/fonts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/nix/store",
)

_SPARE_UIDS = range(61_184, 65_520)
"""The range that systemd sets aside for dynamic users: in no passwd file."""
_SPARE_COUNT = 1024


def interpreter() -> str:
    """The real interpreter below a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def inside_folder() -> str:
    """The folder that holds the `inside` package."""
    return os.path.dirname(os.path.abspath(__file__))


def site_folders() -> list[str]:
    """Where installed packages lie."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [folder for folder in dict.fromkeys(map(os.path.realpath, folders)) if os.path.isdir(folder)]


def readable_paths() -> list[str]:
    """What a session may read: the interpreter's library, installed packages, shared libraries, fonts."""
    own = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        os.path.join(sys.base_prefix, "lib"),
        *site_folders(),
    ]
    existing = [path for path in (*map(os.path.realpath, own), *_LIBRARIES) if os.path.exists(path)]
    return sorted(dict.fromkeys(existing))


def bare_environment() -> dict[str, str]:
    """The environment of the template: nothing of the host's but what its libraries need to load."""
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MPLBACKEND": "Agg", "MALLOC_ARENA_MAX": "2"}
    # Symbols are looked up once, and not by each session.
    environment["LD_BIND_NOW"] = "1"
    # One thread each: a session's threads are limited, and a fork keeps none of the template's.
    environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def spare_uids(process: int) -> tuple[int, int] | None:
    """As root: the first and the number of uids for sessions to drop to; else `None`.

    Args:
        process: an id by which several hosts on one machine pick different parts of the range.
    """
    if os.geteuid() != 0:
        return None
    mapped = [range(inside, inside + count) for inside, _, count in _uid_map()]
    uids = max(mapped, key=len, default=range(0))
    if uids.start <= _SPARE_UIDS.start and _SPARE_UIDS.stop <= uids.stop:
        uids = _SPARE_UIDS
    uids = range(max(uids.start, 1), uids.stop)
    if not uids:
        # A user namespace with no uid but its root, which outside is an ordinary user.
        return None
    parts = max(1, len(uids) // _SPARE_COUNT)
    return uids.start + (process % parts) * _SPARE_COUNT, min(_SPARE_COUNT, len(uids))


def tasks_of_user() -> int:
    """Threads that this user runs now; RLIMIT_NPROC counts them all."""
    total = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
    return total


def _uid_map() -> list[tuple[int, int, int]]:
    with open("/proc/self/uid_map") as lines:
        return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


_TICK_SECONDS = 0.05
_LEAST_SECONDS = 0.001
_FASTEST = 2 << 30
"""Bytes a second that a process may write; from it follows how soon the next look has to be."""
_FILES_PER_MB = 64
_LONGEST_PATH = 3_500
"""Beyond 4,096 bytes a path can't be opened, and what lies there can't be counted."""
_DELETED = b" (deleted)"


class LimitExceededError(Exception):
    """The session went over a limit that the host watches; the message says which."""


class Watched(Protocol):
    """A process to look at."""

    fd: int

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens where the process is gone."""


class Watch:
    """A check of one session.

    Args:
        process: the session's, by its pidfd.
        folder: its work folder, where no mount of its own limits it; else `None`.
        disk_mb: MiB that the folder may hold.
        threads: how many it may run, where others count with them; else `None`.
    """

    def __init__(self, process: Watched, *, folder: str | None, disk_mb: int, threads: int | None) -> None:
        self._process, self._pid = process, pid_of(process.fd)
        self._folder, self._threads = folder, threads
        self._bytes, self._files = disk_mb << 20, disk_mb * _FILES_PER_MB

    def look(self, *, running: bool) -> float:
        """Check once; gives seconds until the next look.

        Args:
            running: it is stopped for the count, and then goes on.

        Raises:
            LimitExceededError: see there.
        """
        if self._threads is not None and _threads(self._pid) > self._threads:
            raise LimitExceededError(f"The code ran more than {self._threads} threads at once.")
        if self._folder is None:
            return _LEAST_SECONDS * 5
        if running:
            self._process.send_signal(signal.SIGSTOP)
        left = self._bytes - self._taken(self._folder)
        if left < 0:
            raise LimitExceededError(f"The code wrote more than {self._bytes >> 20} MB of files.")
        if running:
            self._process.send_signal(signal.SIGCONT)
        return min(_TICK_SECONDS, max(_LEAST_SECONDS, left / _FASTEST))

    def _taken(self, folder: str) -> int:
        used, inodes = folder_bytes(folder, most_files=self._files)
        if len(inodes) > self._files:
            raise LimitExceededError(f"The code made more than {self._files} files.")
        return used + self._hidden(folder, inodes)

    def _hidden(self, folder: str, shown: set[int]) -> int:
        """Bytes of files that no folder shows: they are deleted, and still open or mapped."""
        place = _place(self._pid)
        if place is None:
            return 0
        device = os.stat(folder).st_dev
        found: dict[int, int] = {}
        for name in _listed(f"{place}/fd"):
            status = _status(f"{place}/fd/{name}")
            if status is not None and status.st_nlink == 0 and status.st_dev == device:
                found[status.st_ino] = status.st_blocks * 512
        for inode, area in _mapped(place, folder):
            if inode not in found and inode not in shown:
                status = _status(f"/proc/{self._pid}/map_files/{area}")
                if status is None:
                    raise LimitExceededError("The code kept a deleted file mapped, whose size can't be seen.")
                found[inode] = status.st_blocks * 512
        return sum(found.values())


def folder_bytes(folder: str, *, most_files: int) -> tuple[int, set[int]]:
    """Bytes on disk below a folder, and its inodes; stops counting past `most_files`.

    Raises:
        LimitExceededError: it is too deep to be counted.
    """
    used, inodes = 0, set[int]()
    waiting = [folder]
    while waiting and len(inodes) <= most_files:
        for status, subfolder in _entries(waiting.pop()):
            if status.st_ino not in inodes:
                inodes.add(status.st_ino)
                used += status.st_blocks * 512
            if len(inodes) > most_files:
                break
            if subfolder is not None:
                if len(os.fsencode(subfolder)) > _LONGEST_PATH:
                    raise LimitExceededError("The code made folders in folders too deep to be counted.")
                waiting.append(subfolder)
    return used, inodes


def pid_of(pidfd: int) -> int:
    """The process id behind a pidfd, in this process's namespace; -1 when it is gone."""
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        for line in lines:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _entries(folder: str) -> Iterator[tuple[os.stat_result, str | None]]:
    try:
        # A folder may have been made without the right to list it.
        if not os.access(folder, os.R_OK | os.X_OK):
            os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                yield entry.stat(follow_symlinks=False), entry.path if is_folder else None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise LimitExceededError(f"The code made files that can't be counted: {error.strerror}.") from error


def _threads(pid: int) -> int:
    return len(_listed(f"/proc/{pid}/task"))


def _place(pid: int) -> str | None:
    """Where /proc shows what the threads share; the first of them may have ended before the others."""
    tasks = (f"/proc/{pid}/task/{task}" for task in (pid, *_listed(f"/proc/{pid}/task")))
    return next((task for task in tasks if _listed(f"{task}/fd")), None)


def _mapped(place: str, folder: str) -> Iterator[tuple[int, str]]:
    """Inode and area of each mapping of a deleted file of the folder."""
    try:
        with open(f"{place}/maps", "rb") as file:
            maps = file.read()
    except OSError:
        return
    inside = b" " + os.fsencode(folder) + b"/"
    if inside not in maps:
        return
    for line in maps.splitlines():
        if inside in line and line.endswith(_DELETED):
            area, _, _, _, inode, _ = line.split(None, 5)
            # As `map_files` writes it: without zeros in front.
            yield int(inode), "-".join(f"{int(end, 16):x}" for end in area.split(b"-"))


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
