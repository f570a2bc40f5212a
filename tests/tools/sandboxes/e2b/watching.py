"""What the tests of E2B's client wait for and look at, on the server's side."""

from __future__ import annotations

import time
from collections.abc import Callable

from metis_agent.tools.sandboxes import SandboxLimits

from ..e2b_server import E2BServer
from ..e2b_server import Sandbox as RemoteSandbox

LIMITS = SandboxLimits(seconds=20, output_bytes=4096)
GRACES = (0.5, 0.5, 4.0)
"""Seconds past its limit that an attempt may take: the third on a busy machine, sooner than the SDK would end it."""


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def only(server: E2BServer) -> RemoteSandbox:
    (remote,) = server.sandboxes.values()
    return remote


def started(server: E2BServer, calls: int = 1) -> bool:
    return server.requests.count(("POST", "/execute")) >= calls
