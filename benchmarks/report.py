"""`metis report` of a store of 100,000 trajectories: how long it takes to write, and how soon a browser shows it.

The trajectories are as large as real ones (about 3 KB). First paint is that of headless Chromium with an empty profile,
by the clock, of several fresh loads; `ready` is when the runs can be filtered. Prints JSON; the store is deleted
afterwards. Without Chromium and its driver only the page is measured.

    python benchmarks/report.py [--sizes 10000 100000] [--loads 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.store import write


def page_of(store: Path, page: Path) -> dict[str, Any]:
    """What this process needs to write the page."""
    from metis_agent.report.facts import ReportInputs
    from metis_agent.report.page import write_report

    started = time.perf_counter()
    facts = write_report(ReportInputs(store=str(store)), page)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "page_mb": page.stat().st_size / 1e6,
        "runs": facts.after.runs,
        "runs_on_the_page": len(facts.archive),
    }


def paints(page: Path, profile: Path, loads: int) -> dict[str, Any]:
    """Milliseconds to the first paint, and until the runs are there; of each load."""
    from tests.report.browser import CHROMIUM, DRIVER, browser, show

    if not (CHROMIUM and DRIVER):
        return {"skipped": "no Chromium with its driver on PATH"}
    script = (
        "return [performance.getEntriesByName('first-contentful-paint')[0].startTime,"
        " performance.getEntriesByName('unpack')[0].startTime, performance.now()]"
    )
    first, ready = [], []
    with browser(profile) as driver:
        for _ in range(loads):
            show(driver, page)
            painted, _, now = driver.execute_script(script)
            first.append(round(painted))
            ready.append(round(now))
    return {"first_paint_ms": first, "ready_ms": ready}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary folder by default")
    parser.add_argument(
        "--page", type=Path, nargs=2, metavar=("STORE", "PAGE"), help="write this page, say what it took"
    )
    arguments = parser.parse_args()
    if arguments.page:
        print(json.dumps(page_of(*arguments.page)))
        return
    results = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            store, page = Path(scratch) / "store", Path(scratch) / "report.html"
            write(store, size)
            child = [sys.executable, __file__, "--page", str(store), str(page)]
            made = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            results.append({**made, **paints(page, Path(scratch) / "profile", arguments.loads)})
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
