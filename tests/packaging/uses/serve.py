"""`transformers serve` serves the packaged model, and an OpenAI client gets its answer."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.resources import files

from openai import OpenAI

weights = str(files("metis_agent.worlds.almanac") / "weights")
with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    port = found.getsockname()[1]
url = f"http://127.0.0.1:{port}"
server = subprocess.Popen(
    [sys.executable, "-m", "transformers.cli.transformers", "serve", weights, "--device", "cpu", "--port", str(port)],
    env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)  # fmt: skip
try:
    until = time.monotonic() + 240
    while True:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.3)
    client = OpenAI(base_url=f"{url}/v1", api_key="-", timeout=120)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=weights, messages=question, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content, answer
finally:
    server.kill()
    server.wait()
