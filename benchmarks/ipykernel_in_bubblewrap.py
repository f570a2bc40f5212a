"""What `benchmarks/sandbox.py` compares with: a Jupyter kernel for each session, in bubblewrap.

Runs under a Python that has ipykernel and Pillow, and prints JSON. Namespaces as in common setups of this kind: no
network, an own process tree, everything read-only but a folder of its own; no Landlock, no seccomp, no limits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

__all__ = ["main"]

_SECONDS = 60.0


class Kernel:
    """One session; the sockets of its client and of itself meet in a folder."""

    def __init__(self, folder: Path, page: str) -> None:
        folder.mkdir()
        file, _ = write_connection_file(str(folder / "connection.json"), transport="ipc", ip=str(folder / "socket"))
        command = [
            "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--tmpfs", "/tmp", "--bind", str(folder), str(folder),
            "--ro-bind", sys.prefix, sys.prefix, "--ro-bind", page, page, "--unshare-ipc", "--unshare-pid",
            "--unshare-net", "--unshare-uts", "--die-with-parent", "--chdir", str(folder),
            sys.executable, "-m", "ipykernel_launcher", "-f", file,
        ]  # fmt: skip
        environment = {**os.environ, "HOME": str(folder), "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client = BlockingKernelClient(connection_file=file)
        self._client.load_connection_file()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=_SECONDS)

    def run(self, code: str) -> list[dict[str, Any]]:
        """What the code displayed, by MIME type."""
        shown: list[dict[str, Any]] = []

        def keep(message: dict[str, Any]) -> None:
            if message["msg_type"] in ("execute_result", "display_data"):
                shown.append(message["content"]["data"])

        reply = self._client.execute_interactive(code, timeout=_SECONDS, output_hook=keep)
        if reply["content"]["status"] != "ok":
            raise RuntimeError(reply["content"])
        return shown

    def close(self) -> None:
        self._client.stop_channels()
        self._process.kill()
        self._process.wait()


def measure(page: str, code: str, rounds: int, threads: int) -> dict[str, float]:
    """The figures of `benchmarks/sandbox.py`."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        root = Path(name)
        fresh, calls, crops = [], [], []
        for number in range(rounds):
            began = time.perf_counter()
            kernel = Kernel(root / str(number), page)
            kernel.run("1 + 1")
            fresh.append(time.perf_counter() - began)
            calls += [_seconds(kernel, "1 + 1") for _ in range(20)]
            kernel.run("from PIL import Image")
            crops.append(_seconds(kernel, f"image_1 = Image.open({page!r})\n{code}", picture=True))
            kernel.close()
        return {
            "fresh_session_ms_p50": _median_ms(fresh),
            "call_ms_p50": _median_ms(calls),
            "fresh_sessions_per_second": _rate(root, page, threads),
            "crop_zoom_4k_ms": _median_ms(crops),
        }


def _rate(root: Path, page: str, threads: int) -> float:
    def work(number: int) -> None:
        for again in range(3):
            kernel = Kernel(root / f"rate-{number}-{again}", page)
            kernel.run("1 + 1")
            kernel.close()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return round(3 * threads / (time.perf_counter() - began), 1)


def _seconds(kernel: Kernel, code: str, *, picture: bool = False) -> float:
    began = time.perf_counter()
    shown = kernel.run(code)
    seconds = time.perf_counter() - began
    if picture and not any("image/png" in data for data in shown):
        raise RuntimeError("no image came back")
    return seconds


def _median_ms(seconds: list[float]) -> float:
    return round(statistics.median(seconds) * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--page", required=True)
    parser.add_argument("--code", required=True)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        figures = measure(arguments.page, arguments.code, arguments.rounds, arguments.threads)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
