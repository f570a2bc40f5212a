"""Every local backend that works here, with small limits; one that can't work is skipped with its reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
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

from .e2b_server import KEY, E2BServer, e2b_server

SMALL = SandboxLimits(seconds=10, memory_mb=256, processes=16, disk_mb=8, output_bytes=4096)

BACKENDS = {
    "bubblewrap": lambda: BubblewrapSandbox(SMALL),
    "landlock": lambda: LandlockSandbox(SMALL),
}
OLDEST = {
    # As on the oldest kernel that has Landlock, and without namespaces: what it lacks, the system-call filter and the
    # host must hold.
    "landlock-abi1": lambda: LandlockSandbox(SMALL, abi=1, namespaces=False),
}

SECRET = "the-secret-of-the-host"

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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[E2BServer]:
    """A server that speaks E2B's protocol, to which the environment points; the test needs `allow_hosts`."""
    for name in [name for name in os.environ if name.startswith("E2B_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with e2b_server() as server:
        for name, value in {"API_KEY": KEY, "API_URL": server.url, "SANDBOX_URL": server.url}.items():
            monkeypatch.setenv(f"E2B_{name}", value)
        yield server


@pytest.fixture
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Things of the host to attack, open to every uid: only the sandbox can be what refuses."""
    folder = Path(os.path.realpath("/tmp")) / f"metis-attacked-{os.getpid()}-{time.monotonic_ns()}"
    (folder / ".ssh").mkdir(parents=True)
    key = folder / ".ssh" / "id_rsa"
    key.write_text(SECRET)
    key.chmod(0o666)
    for path in (folder, folder / ".ssh"):
        path.chmod(0o777)
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    os.chmod(folder / "socket", 0o777)
    abstract.bind(f"\0metis-test-{os.getpid()}")
    for listener in (unix, abstract):
        listener.listen(8)
    logs = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    logs[0].bind(str(folder / "log"))
    os.chmod(folder / "log", 0o666)
    logs[1].bind(f"\0metis-test-{os.getpid()}-log")
    yield {"folder": str(folder), "host": os.getpid(), "port": 1, "key": key}
    for listener in (unix, abstract, *logs):
        listener.close()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture
def tcp_port(socket_enabled: None) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield listener.getsockname()[1]


def assert_still_works(session: SandboxSession) -> None:
    assert session.run("40 + 2").result == "42"
