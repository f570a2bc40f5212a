"""An import whose traces are made into trajectories on a Ray cluster of this machine, by the command line."""

import json
import subprocess
from pathlib import Path

from metis_agent.recording.store import TrajectoryStore

said = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Oslo."}]
Path("log.jsonl").write_text("".join(json.dumps({"id": str(n), "messages": said}) + "\n" for n in range(3)))
command = ["metis", "import", "log.jsonl", "--format", "openai", "--store", "runs", "--ray", "local"]
subprocess.run(command, check=True)
assert [trajectory.answer for trajectory in TrajectoryStore("runs").read()] == ["Oslo."] * 3
