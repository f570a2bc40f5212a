"""Does what we publish work for somebody who has only that? `make wheel-test`.

Builds wheel and sdist, and for the wheel alone and with each extra makes a new virtual environment with an empty home,
installs the wheel there, and in an empty folder runs the command line, the README as the wheel carries it, and one real
use of the extra (`uses/`). Everything lies in a temporary folder outside this tree, and an environment is deleted
before the next. Prints JSON with the seconds and the room that each took; exit code 1 where anything failed.

    python -m tests.packaging.clean_rooms [EXTRA ...] [--full-demo] [--folder DIR] [--keep]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.packaging.distributions import ROOT, build
from tests.packaging.room import Room

USES = Path(__file__).with_name("uses")
TORCH = next(pin for pin in (ROOT / "constraints.txt").read_text().splitlines() if pin.startswith("torch=="))
"""Installed first, as the Makefile does: or another package would bring several GB of CUDA."""

ROOMS: dict[str, frozenset[str]] = {
    "": frozenset(),
    "train": frozenset({"torch", "train"}),
    "serve": frozenset({"torch"}),
    "math": frozenset(),
    "e2b": frozenset(),
    "search": frozenset(),
    "tantivy": frozenset(),
    "images": frozenset(),
    "langchain": frozenset({"langchain"}),
    "traces": frozenset(),
    "audit": frozenset(),
    "ray": frozenset(),
    "vllm": frozenset(),
    "docs": frozenset(),
    "all": frozenset({"torch", "train", "langchain"}),
    "dev": frozenset({"torch", "train", "langchain"}),
}
"""Extra -> what it brings: `torch` is installed first, `train` and `langchain` are those extras."""

_INSTALL_TRAIN = "pip install 'langgraph-metis[train]'"
_ROW = re.compile(r"^\| (accuracy|redundant|necessary|calls a question)\b[^|]*\|([^|]*)\|([^|]*)\|", re.MULTILINE)
_README = """
import contextlib, io, re, sys
from importlib.metadata import metadata

text = metadata("langgraph-metis").get_payload()
found = re.findall(r"```python\\n(.*?)```(?:\\n+```text\\n(.*?)```)?", text, re.DOTALL)
wanted = [pair for pair in found if any(name in pair[0] for name in sys.argv[1:])]
assert len(wanted) == len(sys.argv[1:]), [pair[0] for pair in found]
for code, expected in wanted:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "__main__"})
    assert printed.getvalue().strip() == expected.strip(), (printed.getvalue(), expected)
"""
"""Runs those snippets of the installed README that name these words, and compares what they print."""


def inspect(room: Room, wheel: Path, *, full_demo: bool) -> None:
    """Install, and try all of it."""
    has = ROOMS[room.extra]
    if not (room.check("environment", room.make) and room.check("install", partial(_install, room, wheel))):
        return
    room.figures["megabytes"] = round(_size(room.folder / "venv") / 1e6)
    room.check("pip check", partial(room.pip, "check"))
    room.check("where it comes from", partial(_comes_from_the_environment, room))
    room.check("metis --help", partial(_prints, room, "metis demo", "metis", "--help"))
    room.check("metis doctor", partial(_doctor, room))
    if "train" in has:
        room.check("metis ask", partial(_prints, room, "35241510", "metis", "ask", "What is 4821 * 7310?"))
        room.check("metis demo", partial(_demo, room, whole=full_demo))
    else:
        # What serves a model can also ask one; training takes more.
        ask = partial(_prints, room, "Hello!") if "torch" in has else partial(_refuses, room)
        room.check("metis ask", partial(ask, "metis", "ask", "hi"))
        room.check("metis demo", partial(_refuses, room, "metis", "demo"))
    words = [word for word, extra in (("LocalChatModel", "train"), ("create_agent(", "langchain")) if extra in has]
    if words:
        room.check("README", partial(room.run, "python", "-I", "-c", _README, *words))
    use = room.source / "tests" / "packaging" / "uses" / f"{room.extra or 'runtime'}.py"
    room.check("use", partial(room.run, "python", "-I", str(use)))


def _install(room: Room, wheel: Path) -> None:
    install = ["install", "--quiet", "--disable-pip-version-check"]
    if "torch" in ROOMS[room.extra]:
        install.append("--no-compile")  # most of the work, for what is never imported
        room.pip(*install, TORCH)
    room.pip(*install, f"{wheel}[{room.extra}]" if room.extra else str(wheel))


def _comes_from_the_environment(room: Room) -> None:
    found = room.run("python", "-c", "import metis_agent; print(metis_agent.__file__)").stdout
    assert found.startswith(str(room.folder / "venv")), found


def _prints(room: Room, wanted: str, *command: str) -> None:
    shown = room.run(*command).stdout
    assert wanted in shown, shown


def _refuses(room: Room, *command: str) -> None:
    """One line that says what to install."""
    done = room.run(*command, code=1)
    assert _INSTALL_TRAIN in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def _doctor(room: Room) -> None:
    report = json.loads(room.run("metis", "doctor", "--json").stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"], report
    mine = checks.get(f"extra {room.extra}")
    assert mine is None or mine["status"] == "ok" or (room.extra == "e2b" and "no key" in mine["detail"]), mine
    absent = {name.removeprefix("extra ") for name, check in checks.items() if check["status"] == "absent"}
    remedies = [check["remedy"] for name, check in checks.items() if name.startswith("extra ") and check["remedy"]]
    assert all("pip install" in remedy or "E2B_API_KEY" in remedy for remedy in remedies), remedies
    assert ("train" in absent) == ("train" not in ROOMS[room.extra]), absent


def _demo(room: Room, *, whole: bool) -> None:
    """The whole demo's figures are the README's; a short one only has to come to its end."""
    short = () if whole and room.extra == "train" else ("--steps", "1", "--questions", "10")
    shown = room.run("metis", "demo", *short).stdout
    figures = json.loads((room.folder / "work" / "runs" / "demo" / "metrics.json").read_text())
    assert "held-out questions" in shown, shown
    assert figures["cold_start"]["redundant_rate"] == 1.0
    if short:
        return
    room.figures["demo"] = found = {name: [_of(figures[it], name) for it in ("cold_start", "hdpo")] for name in _NAMES}
    printed = {
        row[0]: [_first_number(cell) for cell in row[1:]] for row in _ROW.findall((ROOT / "README.md").read_text())
    }
    for name, said in _NAMES.items():
        # Sampling differs a little from one machine's arithmetic to another's.
        assert all(abs(a - b) <= 0.05 for a, b in zip(found[name], printed[said], strict=True)), (found, printed)


_NAMES = {
    "accuracy": "accuracy", "redundant_rate": "redundant", "necessary_recall": "necessary",
    "calls_per_question": "calls a question",
}  # fmt: skip


def _of(measured: dict[str, Any], name: str) -> float:
    return float(measured[name])


def _first_number(cell: str) -> float:
    found = re.search(r"\d+\.\d+", cell)
    assert found, cell
    return float(found.group())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "extras", nargs="*", metavar="EXTRA", help="'runtime' for the wheel alone; by default every one"
    )
    parser.add_argument(
        "--full-demo", action="store_true", help="where train is alone, run metis demo whole and compare its figures"
    )
    parser.add_argument("--folder", type=Path, help="for the environments, a few GB; by default the system's")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    arguments = parser.parse_args()
    wanted = ["" if name == "runtime" else name for name in arguments.extras] or list(ROOMS)
    if unknown := sorted(set(wanted) - set(ROOMS)):
        parser.error(f"no such extra: {', '.join(unknown)}")
    scratch = Path(tempfile.mkdtemp(prefix="metis-clean-", dir=arguments.folder))
    try:
        sdist, wheel = build(ROOT, scratch / "dist", "sdist", "wheel")
        report: dict[str, Any] = {"wheel_mb": _mb(wheel), "sdist_mb": _mb(sdist), "rooms": {}}
        with tarfile.open(sdist) as file:
            file.extractall(scratch / "source", filter="data")
        (source,) = (scratch / "source").iterdir()
        for extra in wanted:
            name = extra or "runtime"
            print(name, file=sys.stderr, flush=True)
            room = Room(folder=scratch / name, source=source, extra=extra)
            inspect(room, wheel, full_demo=arguments.full_demo)
            report["rooms"][name] = {**room.figures, "seconds": room.seconds, "failures": room.failures}
            if not arguments.keep:
                shutil.rmtree(room.folder)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(report, indent=2))
    sys.exit(any(room["failures"] for room in report["rooms"].values()))


def _mb(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 2)


if __name__ == "__main__":
    main()
