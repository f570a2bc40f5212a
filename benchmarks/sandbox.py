"""Measures the sandboxes: a fresh session, a call, sessions a second, and an image cropped, zoomed and shown.

Run `python benchmarks/sandbox.py [--threads 100] [--rounds 200]`; prints JSON, one entry for each backend that
works here, and one for ipykernel in bubblewrap. Milliseconds are medians. A fresh session is opening it and one call
in it; the rate is that plus closing it, from many threads at the same time. Crop and zoom is a whole call of the
`python` tool in a fresh session: an image of 3840 x 2160 pixels is decoded and handed in, a part of it enlarged to
1600 x 1200, and its content block comes back; a page as PNG, a photograph as JPEG. `--ipykernel` names a Python that
has ipykernel and Pillow; by default one is made, with pip, and thrown away.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from PIL import Image, ImageDraw

from metis_agent.errors import InfrastructureError
from metis_agent.tools.python import PythonTool
from metis_agent.tools.sandboxes import Sandbox, open_sandbox

__all__ = ["main", "measure"]

_SIZE = (3840, 2160)
_CROP = "image_1.crop((1000, 500, 1800, 1100)).resize((1600, 1200))"
_PEER = Path(__file__).with_name("ipykernel_in_bubblewrap.py")


def measure(sandbox: Sandbox, *, rounds: int, threads: int) -> dict[str, float]:
    """The figures of one sandbox."""
    sandbox.open().close()
    return {
        "fresh_session_ms_p50": _fresh_session(sandbox, rounds),
        "call_ms_p50": _call(sandbox, rounds),
        "fresh_sessions_per_second": _rate(sandbox, rounds * 5, threads),
        "crop_zoom_4k_ms": _crop_zoom(sandbox, page_4k(), max(5, rounds // 10)),
        "crop_zoom_4k_photo_ms": _crop_zoom(sandbox, photo_4k(), max(5, rounds // 10)),
    }


def measure_ipykernel(python: str | None, *, rounds: int) -> dict[str, object]:
    """The same of a Jupyter kernel in bubblewrap, or why it can't be had."""
    if shutil.which("bwrap") is None:
        return {"unavailable": "bubblewrap is not installed"}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        try:
            page = Path(folder) / "page.png"
            page.write_bytes(page_4k())
            peer = [python or _throw_away_python(Path(folder)), str(_PEER), "--page", str(page), "--code", _CROP]
            ran = subprocess.run([*peer, "--rounds", str(rounds)], capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            return {"unavailable": (error.stderr or str(error)).strip().splitlines()[-1]}
    figures: dict[str, object] = json.loads(ran.stdout)
    return figures


def page_4k() -> bytes:
    """A PNG of a page with text and lines on a shaded ground."""
    image = Image.radial_gradient("L").resize(_SIZE).convert("RGB")
    draw = ImageDraw.Draw(image)
    for number in range(400):
        place = (number * 37 % _SIZE[0], number * 91 % _SIZE[1])
        draw.text(place, f"sign {number}", fill="white")
        draw.line((place, (place[1], place[0])), fill=(number % 256, 90, 160))
    return _file(image, "PNG")


def photo_4k() -> bytes:
    """A JPEG with the grain of a photograph."""
    ground = Image.merge("RGB", [Image.effect_noise((480, 270), 90).resize(_SIZE, 3) for _ in range(3)])
    return _file(Image.blend(ground, Image.effect_noise(_SIZE, 30).convert("RGB"), 0.2), "JPEG")


def _file(image: Image.Image, kind: str) -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def _throw_away_python(folder: Path) -> str:
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, capture_output=True, text=True)
    python = folder / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "ipykernel", "pillow"]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return str(python)


def _crop_zoom(sandbox: Sandbox, content: bytes, rounds: int) -> float:
    block = {"type": "image", "base64": base64.b64encode(content).decode(), "mime_type": "image/png"}
    arguments = {"code": _CROP, "messages": [HumanMessage([block])]}
    call = {"type": "tool_call", "id": "1", "name": "python", "args": arguments}
    tool = PythonTool(sandbox=sandbox)

    def once() -> float:
        began = time.perf_counter()
        message: Any = tool.invoke(call)
        seconds = time.perf_counter() - began
        if [block["type"] for block in message.content] != ["text", "image"]:
            raise RuntimeError(f"no image came back: {message.content}")
        return seconds

    return _median_ms(once, rounds)


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
    parser.add_argument("--ipykernel", metavar="PYTHON", help="a Python with ipykernel and Pillow")
    arguments = parser.parse_args()
    backends: dict[str, object] = {}
    default: dict[str, object] = {}
    for backend in ("bubblewrap", "landlock"):
        try:
            with open_sandbox(backend=backend) as sandbox:
                figures = measure(sandbox, rounds=arguments.rounds, threads=arguments.threads)
                backends[backend] = {"name": sandbox.name, **figures}
                default = default or {"default": sandbox.name, **figures}
        except InfrastructureError as error:
            backends[backend] = {"unavailable": str(error).splitlines()[0], "why": str(error)}
    backends["ipykernel in bubblewrap"] = measure_ipykernel(arguments.ipykernel, rounds=max(3, arguments.rounds // 20))
    load = round(os.getloadavg()[0], 2)
    print(json.dumps({"cores": os.cpu_count(), "load_average": load, **default, "backends": backends}, indent=2))


if __name__ == "__main__":
    main()
