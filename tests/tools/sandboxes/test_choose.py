"""Choosing by what works, refusing with reasons, and the flag for no containment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from metis_agent.errors import ConfigurationError, SandboxUnavailableError
from metis_agent.tools.sandboxes import (
    BubblewrapSandbox,
    Execution,
    LandlockSandbox,
    Sandbox,
    SandboxLimits,
    UnsafeSandbox,
    UnsafeSandboxWarning,
    choose,
    diagnose,
    local,
    open_sandbox,
)
from metis_agent.tools.sandboxes.choose import failures

from .conftest import LIGHT_IMPORT, PACKAGE


def test_a_working_backend_has_no_failures(sandbox: Sandbox) -> None:
    assert failures(sandbox) == []
    assert isinstance(sandbox, Sandbox)


def test_a_package_below_tmp_works(sandbox: Sandbox) -> None:
    """Sessions have a `/tmp` of their own, which once hid an environment that lay there."""
    kind = type(sandbox).__name__
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        copied = shutil.copytree(PACKAGE, Path(folder) / "metis_agent", ignore=shutil.ignore_patterns("weights"))
        script = LIGHT_IMPORT.replace(str(PACKAGE), str(copied)) + (
            f"from metis_agent.tools.sandboxes import {kind}, SandboxLimits\n"
            "from metis_agent.tools.sandboxes.choose import failures\n"
            f"print(failures({kind}(SandboxLimits(memory_mb=256))))"
        )
        ran = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_no_containment_is_found_out() -> None:
    with pytest.warns(UnsafeSandboxWarning):
        sandbox = UnsafeSandbox(SandboxLimits(memory_mb=4096), allow_unsafe=True)
    found = failures(sandbox)
    for escape in ("read a file outside", "wrote a file outside", "signalled the host", "opened a network socket"):
        assert f"code in it {escape}" in found
    if sys.platform == "linux":
        assert "code in it read the host's environment" in found


def test_the_first_that_works(sandbox: Sandbox) -> None:
    with open_sandbox() as chosen:
        report = next(report for report in diagnose() if report.works)
        assert {"bubblewrap": BubblewrapSandbox, "landlock": LandlockSandbox}[report.backend] is type(chosen)
        with chosen.open() as session:
            assert session.run("1 + 1").result == "2"


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bubblewrap, and a kernel without Landlock."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(local, "supported_abi", lambda: 0)


def test_refused_with_reasons(bare_machine: None) -> None:
    with pytest.raises(SandboxUnavailableError) as caught:
        open_sandbox()
    message = str(caught.value)
    for part in (
        "bubblewrap is not installed",
        "no Landlock",
        "apt-get install bubblewrap",
        "E2B_API_KEY",
        "allow_unsafe=True",
    ):
        assert part in message
    assert [report.works for report in diagnose()] == [False, False, False]


def test_a_leaky_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "failures", lambda sandbox: ["code in it read a file outside"])
    with pytest.raises(SandboxUnavailableError, match="landlock: code in it read a file outside"):
        open_sandbox(backend="landlock")


def test_a_program_that_is_not_bubblewrap(tmp_path: Path) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho no permission to make namespaces >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(SandboxUnavailableError, match="no permission to make namespaces"):
        BubblewrapSandbox(program=str(program)).open()
    with pytest.raises(SandboxUnavailableError, match="absent"):
        BubblewrapSandbox(program=str(tmp_path / "absent")).open()


def test_unsafe_only_by_name_and_flag(bare_machine: None) -> None:
    with pytest.raises(ConfigurationError, match="allow_unsafe=False"):
        UnsafeSandbox()
    with pytest.raises(ConfigurationError, match="allow_unsafe=True"):
        open_sandbox(backend="unsafe")
    with pytest.warns(UnsafeSandboxWarning, match="does not contain"):
        assert open_sandbox(allow_unsafe=True).name == "no containment"


def test_unsafe_is_not_taken_where_something_contains(sandbox: Sandbox) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_sandbox(allow_unsafe=True) as chosen:
            assert not isinstance(chosen, UnsafeSandbox)


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigurationError, match=r"backend='docker'.*auto, e2b, bubblewrap, landlock, unsafe"):
        open_sandbox(backend="docker")  # type: ignore[arg-type]


def test_the_unsafe_session() -> None:
    with pytest.warns(UnsafeSandboxWarning):
        sandbox = UnsafeSandbox(SandboxLimits(output_bytes=256), allow_unsafe=True)
    with sandbox, sandbox.open() as session:
        session.run("x = 1")
        assert session.run("x + 1").result == "2"
        assert len(session.run("print('y' * 1000)").stdout) == 256
        stopped = session.run("print('begun')\nwhile True: pass", timeout=0.3)
        assert (stopped.status, stopped.stdout) == ("timeout", "begun\n")
        assert "NameError" in session.run("x").traceback
        child = session.run("import os\npid = os.fork()\nif pid == 0:\n    import time; time.sleep(60)\npid").result
        assert isinstance(session.run("1"), Execution)
        folder = session.run("print(os.getcwd())").stdout.strip()
    assert not os.path.exists(folder)
    assert child is not None
