"""A session that is not contained: the same conversation, in a process with the rights of the user.

It holds a few limits (memory, file size) so that accidents stay small. It is no defence.
"""

import contextlib
import json
import os
import socket
import sys
import threading

from . import imports
from .screen import Screen
from .serve import announce, serve

__all__ = ["main"]


def main() -> None:
    """Arguments: a folder to take off the path, the stream's and the screen's descriptor, settings as JSON."""
    sys.path.remove(sys.argv[1])
    stream = socket.socket(fileno=int(sys.argv[2]))
    settings = json.loads(sys.argv[4])
    threading.Thread(target=_end_with_host, daemon=True).start()

    def prepare() -> None:
        imports.add_site_folders(settings["site"])
        imports.be_like_a_console()
        os.chdir(settings["folder"])
        _limit(settings)

    if announce(stream, prepare):
        serve(stream, Screen(int(sys.argv[3]), settings["output"]), settings["output"])


def _end_with_host() -> None:
    """Standard input is a pipe that the host holds open; its end means that the host is gone."""
    os.read(0, 1)
    os._exit(0)


def _limit(settings: dict[str, int]) -> None:
    import resource

    for kind, value in ((resource.RLIMIT_DATA, settings["memory"]), (resource.RLIMIT_FSIZE, settings["disk"])):
        # macOS refuses some of these.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))
