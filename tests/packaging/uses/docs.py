"""The site is built from the source tree that this file stands in."""

import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[3]
site = Path("site").resolve()
done = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
    cwd=root, capture_output=True, text=True,
)  # fmt: skip
assert done.returncode == 0, done.stderr
assert (site / "index.html").exists()
