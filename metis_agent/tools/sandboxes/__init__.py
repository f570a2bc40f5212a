"""Sandboxes: where a model's code runs.

- `base`: the protocols `Sandbox` and `SandboxSession`, and `Execution`; `limits`: `SandboxLimits`
- `choose`: `open_sandbox`, the first backend that passes `selftest`, real attempts to get out
- `bubblewrap`: namespaces, a tmpfs for each session, Landlock, seccomp
- `landlock`: Landlock and seccomp, without root and without anything installed
- `e2b`: remote sandboxes at E2B, where a key is set
- `unsafe`: a plain subprocess, behind a flag
- `warm`: what the contained backends share, a warm template that forks sessions; below it `template`,
  `session`, `process`, `watch` and `machine` are the host's side, and `inside` is the other side
- `pictures`: images into a session, and figures and images out of it
- `pool` and `report`: sessions by key, and an execution in words, for the `python` tool
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
from metis_agent.tools.sandboxes.bubblewrap import BubblewrapSandbox
from metis_agent.tools.sandboxes.choose import Backend, BackendReport, diagnose, open_sandbox
from metis_agent.tools.sandboxes.e2b import E2BSandbox, E2BSession
from metis_agent.tools.sandboxes.landlock import LandlockSandbox
from metis_agent.tools.sandboxes.unsafe import UnsafeSandbox, UnsafeSandboxWarning

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
