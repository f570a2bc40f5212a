"""The tests of the layers and of the runtime pass on the source tree that this file stands in."""

import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[3]
command = [sys.executable, "-m", "pytest", "tests/test_layers.py", "tests/recording", "tests/gates"]
done = subprocess.run(command, cwd=root, capture_output=True, text=True)
assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
