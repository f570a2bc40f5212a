"""Sandboxes: where a model's code runs.

- `base`: the protocols `Sandbox` and `SandboxSession`, `SandboxLimits`, `Execution`, and images in and out
- `choose`: `open_sandbox`, the first backend that passes the self-test, real attempts to get out
- `local`: bubblewrap (namespaces, a tmpfs for each session, Landlock, seccomp), Landlock with seccomp alone, and a
  plain subprocess behind a flag, which contains nothing
- `e2b`: remote sandboxes at E2B, where a key is set
- `template`: what the contained backends share, a warm template that forks sessions; below it `session`, `process`
  and `machine` are the host's side, and `inside` is the other side
"""

from metis_agent.tools.sandboxes.base import (
    Execution,
    ExecutionStatus,
    InputImage,
    Sandbox,
    SandboxLimits,
    SandboxSession,
    ShownImage,
)
from metis_agent.tools.sandboxes.choose import Backend, BackendReport, diagnose, open_sandbox
from metis_agent.tools.sandboxes.e2b import E2BSandbox, E2BSession
from metis_agent.tools.sandboxes.local import BubblewrapSandbox, LandlockSandbox, UnsafeSandbox, UnsafeSandboxWarning

__all__ = [
    "Backend",
    "BackendReport",
    "BubblewrapSandbox",
    "E2BSandbox",
    "E2BSession",
    "Execution",
    "ExecutionStatus",
    "InputImage",
    "LandlockSandbox",
    "Sandbox",
    "SandboxLimits",
    "SandboxSession",
    "ShownImage",
    "UnsafeSandbox",
    "UnsafeSandboxWarning",
    "diagnose",
    "open_sandbox",
]
