"""Whether a sandbox contains, here and now: real attempts to get out, from the inside.

A backend is chosen for what it does, not for being installed: a kernel option, a container or a security
module can take away any part of it.
"""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Mapping

from metis_agent.tools.sandboxes.base import Sandbox
from metis_agent.tools.sandboxes.e2b import E2BSandbox
from metis_agent.tools.sandboxes.inside.folders import everyone_may_enter

__all__ = ["failures"]

_LOOP_SECONDS = 0.1

_ESCAPES = """
import os, socket
escapes = {{
    "read a file outside": lambda: open({secret!r}).read(),
    "wrote a file outside": lambda: open({secret!r} + ".written", "w"),
    "read the host's environment": lambda: open("/proc/{host}/environ").read(),
    "signalled the host": lambda: os.kill({host} if {host} != os.getpid() else 1, 0),
    "opened a network socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "started a process": lambda: os.fork() or os._exit(0),
    "used {memory} MB more memory than it may": lambda: bytearray(2 * {memory} << 20),
}}
succeeded = []
for name, attempt in escapes.items():
    try:
        attempt()
        succeeded.append(name)
    except (OSError, MemoryError):
        pass
succeeded
"""

# On a machine of its own code may start processes and fill the memory; but is it one?
_REMOTE_ESCAPES = """
import socket
escapes = {{
    "read a file of this machine": lambda: open({secret!r}).read(),
    "wrote a file of this machine": lambda: open({secret!r}, "r+"),
    "reached the internet": lambda: {internet} or socket.create_connection(("1.1.1.1", 443), timeout=1).close(),
}}
succeeded = []
for name, attempt in escapes.items():
    try:
        if attempt() is not True:
            succeeded.append(name)
    except OSError:
        pass
succeeded
"""

_WORK = """
import colorsys, os
with open("note", "w") as note:
    note.write("kept")
open("note").read(), os.getcwd() == os.path.abspath(".")
"""


def failures(sandbox: Sandbox) -> list[str]:
    """What is wrong with a sandbox, in words; an empty list where it works and contains.

    Raises:
        SandboxUnavailableError: it can't start.
        SandboxGoneError: it died under the test.
    """
    remote = isinstance(sandbox, E2BSandbox)
    parent = tempfile.gettempdir() if everyone_may_enter(os.path.realpath(tempfile.gettempdir())) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="metis-probe-", dir=parent) as folder, sandbox.open() as session:
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        # Open to every uid, so that only the sandbox can be what refuses.
        os.chmod(secret, 0o666)
        os.chmod(folder, 0o777)
        wrong = []
        work = session.run(_WORK)
        if work.result != "('kept', True)":
            wrong.append(f"ordinary code does not run in it: {work.traceback or work.reason or work.result}")
        names: Mapping[str, object] = {
            "secret": secret,
            "host": os.getpid(),
            "memory": sandbox.limits.memory_mb,
            "internet": getattr(sandbox, "internet", False),
        }
        escaped = session.run((_REMOTE_ESCAPES if remote else _ESCAPES).format_map(names))
        if escaped.status != "ok":
            wrong.append(f"the attempts to escape did not run: {escaped.traceback or escaped.reason}")
        else:
            wrong += [f"code in it {name}" for name in ast.literal_eval(escaped.result or "[]")]
        # Of a remote one, the time is kept on this side.
        if not remote and session.run("while True: pass", timeout=_LOOP_SECONDS).status != "timeout":
            wrong.append("an endless loop was not stopped")
        return wrong
