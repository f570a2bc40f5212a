"""Measures the sandboxes: how long a fresh session and a call take, and how many sessions a second.

Run `python benchmarks/sandbox.py [--threads 100] [--rounds 200]`; prints JSON, one entry for each backend that
works here. Milliseconds are medians. A fresh session is opening it and one call in it; the rate is that plus
closing it, from many threads at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable

from metis_agent.errors import InfrastructureError
from metis_agent.tools.sandboxes import Sandbox, open_sandbox

__all__ = ["main", "measure"]


def measure(sandbox: Sandbox, *, rounds: int, threads: int) -> dict[str, float]:
    """The figures of one sandbox."""
    sandbox.open().close()
    return {
        "fresh_session_ms_p50": _fresh_session(sandbox, rounds),
        "call_ms_p50": _call(sandbox, rounds),
        "fresh_sessions_per_second": _rate(sandbox, rounds * 5, threads),
    }


def _fresh_session(sandbox: Sandbox, rounds: int) -> float:
    def once() -> float:
        began = time.perf_counter()
        session = sandbox.open()
        session.run("1 + 1")
        seconds = time.perf_counter() - began
        session.close()
        return seconds

    return _median_ms(once, rounds)


def _call(sandbox: Sandbox, rounds: int) -> float:
    with sandbox.open() as session:

        def once() -> float:
            began = time.perf_counter()
            session.run("1 + 1")
            return time.perf_counter() - began

        return _median_ms(once, rounds)


def _rate(sandbox: Sandbox, sessions: int, threads: int) -> float:
    share = max(1, sessions // threads)

    def work() -> None:
        for _ in range(share):
            with sandbox.open() as session:
                session.run("1 + 1")

    workers = [threading.Thread(target=work) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return round(share * threads / (time.perf_counter() - began), 1)


def _median_ms(once: Callable[[], float], rounds: int) -> float:
    return round(statistics.median(once() for _ in range(rounds)) * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    backends: dict[str, object] = {}
    for backend in ("bubblewrap", "landlock"):
        try:
            with open_sandbox(backend=backend) as sandbox:
                figures = measure(sandbox, rounds=arguments.rounds, threads=arguments.threads)
                backends[backend] = {"name": sandbox.name, **figures}
        except InfrastructureError as error:
            backends[backend] = {"unavailable": str(error).splitlines()[0], "why": str(error)}
    load = round(os.getloadavg()[0], 2)
    print(json.dumps({"cores": os.cpu_count(), "load_average": load, "backends": backends}, indent=2))


if __name__ == "__main__":
    main()
