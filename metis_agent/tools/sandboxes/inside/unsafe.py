"""A session that is not contained: the same conversation, in a process with the rights of the user.

It holds a few limits (memory, file size) so that accidents stay small. It is no defence.
"""

import contextlib
import json
import os
import socket
import sys
import threading
from typing import Any

from . import imports
from .screen import Screen
from .serve import AnswerLimits, announce, serve

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
        answer = AnswerLimits(*settings["answer"])
        serve(stream, Screen(int(sys.argv[3]), answer.text), answer)


def _end_with_host() -> None:
    """Standard input is a pipe that the host holds open; its end means that the host is gone."""
    os.read(0, 1)
    os._exit(0)


def _limit(settings: dict[str, Any]) -> None:
    import resource

    for kind, value in ((resource.RLIMIT_DATA, settings["memory"]), (resource.RLIMIT_FSIZE, settings["disk"])):
        # macOS refuses some of these.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (value, value))
