"""Servers that a test starts in a process of their own."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx

__all__ = ["wait_for"]


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path | None = None) -> None:
    """Until it answers; one that ends before is a failure, with its log where it has one."""
    while server.poll() is None:
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"the server ended with {server.returncode}: {log.read_text() if log else 'no log'}")
