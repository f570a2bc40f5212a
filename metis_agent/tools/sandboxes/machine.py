"""What this machine has to offer a sandbox: paths to read, uids to spare, the bare environment."""

from __future__ import annotations

import contextlib
import os
import site
import sys
import sysconfig

__all__ = [
    "bare_environment",
    "inside_folder",
    "interpreter",
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
