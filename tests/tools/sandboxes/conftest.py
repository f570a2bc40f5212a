"""Every local backend that works here, with small limits; one that can't work is skipped with its reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import metis_agent.errors
from metis_agent.errors import InfrastructureError
from metis_agent.tools.sandboxes import (
    BubblewrapSandbox,
    LandlockSandbox,
    Sandbox,
    SandboxLimits,
    SandboxSession,
    UnsafeSandbox,
    UnsafeSandboxWarning,
)

SMALL = SandboxLimits(seconds=10, memory_mb=256, processes=16, disk_mb=8, output_bytes=4096)

BACKENDS = {
    "bubblewrap": lambda: BubblewrapSandbox(SMALL),
    "landlock": lambda: LandlockSandbox(SMALL),
}
OLDEST = {
    # As on the oldest kernel that has Landlock: what it lacks, the system-call filter must hold.
    "landlock-abi1": lambda: LandlockSandbox(SMALL, abi=1),
}

PACKAGE = Path(metis_agent.errors.__file__).parent

LIGHT_IMPORT = f"""
import sys, types
for name, folder in (("metis_agent", {str(PACKAGE)!r}), ("metis_agent.tools", {str(PACKAGE / "tools")!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
"""
"""For subprocesses: the sandboxes without the rest of the package, which takes a second to import."""


@pytest.fixture(scope="session", params=BACKENDS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    yield from opened(request.param, BACKENDS[request.param]())


@pytest.fixture(scope="session", params=[*BACKENDS, *OLDEST])
def any_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    yield from opened(request.param, (BACKENDS | OLDEST)[request.param]())


def opened(name: str, sandbox: Sandbox) -> Iterator[Sandbox]:
    if sys.platform != "linux":
        pytest.skip("the local backends need Linux")
    try:
        sandbox.open().close()
    except InfrastructureError as error:
        pytest.skip(f"{name} can't work here: {error}")
    with sandbox:
        yield sandbox


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[SandboxSession]:
    with sandbox.open() as session:
        yield session


@pytest.fixture
def unsafe_session() -> Iterator[SandboxSession]:
    with pytest.warns(UnsafeSandboxWarning):
        sandbox = UnsafeSandbox(SMALL, allow_unsafe=True)
    with sandbox, sandbox.open() as session:
        yield session
