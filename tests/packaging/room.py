"""A clean room: a new virtual environment, an empty home, and an empty folder to work in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Room"]

_KEPT = {"PATH", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"}
"""Of the environment; and what tells pip where packages come from."""


@dataclass(kw_only=True)
class Room:
    """Where one extra is tried; what failed is noted, and the rest still runs."""

    folder: Path
    source: Path
    """The sdist, unpacked."""
    extra: str
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def make(self) -> None:
        """The three folders; packages come by the pip that runs this, which is quicker than one more of them."""
        for name in ("home", "work"):
            (self.folder / name).mkdir(parents=True)
        venv.create(self.folder / "venv", symlinks=True)

    def pip(self, *arguments: str) -> None:
        """Run pip on the environment.

        Raises:
            AssertionError: it failed; says what it printed.
        """
        command = [sys.executable, "-m", "pip", "--python", str(self.folder / "venv" / "bin" / "python"), *arguments]
        done = subprocess.run(
            command, cwd=self.folder / "work", env=self._environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith("PIP_")}
        return kept | {
            "HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PATH": f"{self.folder / 'venv' / 'bin'}{os.pathsep}{kept['PATH']}",
        }  # fmt: skip

    def run(self, *command: str, code: int = 0, timeout: float = 1800) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the empty folder.

        Raises:
            AssertionError: it ended with another code; says what it printed.
        """
        program = self.folder / "venv" / "bin" / command[0]
        done = subprocess.run(
            [str(program), *command[1:]], cwd=self.folder / "work", env=self._environment(), capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
        return done

    def check(self, name: str, what: Callable[[], Any]) -> bool:
        """Time it; a check that fails is noted. Returns whether it held."""
        started = time.perf_counter()
        try:
            what()
        except (AssertionError, subprocess.SubprocessError, ValueError, KeyError, OSError) as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
        self.seconds[name] = round(time.perf_counter() - started, 2)
        print(f"  {name}: {self.failures.get(name, 'ok')} ({self.seconds[name]} s)", file=sys.stderr, flush=True)
        return name not in self.failures
