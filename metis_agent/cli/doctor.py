"""`metis doctor`: what works on this machine, what does not, and what to do about it.

Everything is tried, not looked up: the sandboxes are attacked, the store is written to, the index is built.
Only `--online` touches the network.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metis_agent.cli.output import screen

if TYPE_CHECKING:
    from metis_agent.tools.sandboxes import Backend, BackendReport

__all__ = ["Check", "doctor", "examine"]

_MARKS = {"ok": "[green]works[/]", "absent": "[yellow]absent[/]", "broken": "[bold red]broken[/]"}
_REMEDIES = {
    "store": "Name a place that this user may write to, with --store.",
    "text search": "Use a Python whose SQLite has FTS5, such as those of python.org, conda and uv.",
    "torch": "Install a PyTorch that fits this machine's driver: https://pytorch.org/get-started",
    "web search": "Check the network and its proxy; the agent works without web search.",
}
_DISTRIBUTION = "langgraph-metis"
_NAMESAKE = "metis-agent"
"""Another project's distribution, whose import package and command have the names of ours."""
_EXTRAS = {
    "images": "images that users send, and image search",
    "search": "search of the web",
    "tantivy": "a faster index for text search",
    "train": "training, and local models",
    "langchain": "the gate as middleware of create_agent",
    "vllm": "models served by vLLM",
    "e2b": "the python tool in E2B's cloud",
    "math": "answers that are mathematics",
    "serve": "serving a decision model by transformers",
    "traces": "traces in Parquet and in LangGraph checkpointers",
    "audit": "prices of models in metis audit",
    "ray": "imports, rollouts and outcomes spread over a Ray cluster",
}
"""What each extra is for."""
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
"""An image."""
_DRAWS = """
import importlib
for name in ("numpy", "PIL", "matplotlib"):
    try:
        importlib.import_module(name)
        print(name)
    except ImportError:
        pass
image_1.rotate(90)
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one look found."""

    name: str
    status: Literal["ok", "absent", "broken"]
    """`absent` is what can be done without; `broken` is there, but does not work."""
    detail: str
    remedy: str = ""
    """What to do, where it does not work."""
    core: bool = False
    """True where nothing works without it."""


def examine(*, store: str = "runs", online: bool = False) -> list[Check]:
    """Look at everything.

    Args:
        store: where trajectories are to be written; a folder or an fsspec URL. What is written is removed again.
        online: also try the web search, and E2B where a key is set.
    """
    checks = [_guarded("python", True, _python), _packages(), *_namesake()]
    checks.append(_guarded("store", True, lambda: _store(store)))
    checks.append(_guarded("text search", True, _text_search))
    checks += _sandboxes(online)
    if _unmet(extra="images") == []:
        checks.append(_guarded("image search", False, _images))
    checks += [_guarded(f"extra {name}", False, partial(_extra, name)) for name in _EXTRAS]
    checks.append(_guarded("torch", False, _torch))
    if online:
        checks.append(_guarded("web search", False, _web_search))
    return checks


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    store: Annotated[str, typer.Option(help="Where trajectories are to be written: a folder or a URL.")] = "runs",
    online: Annotated[bool, typer.Option("--online", help="Also try the web search, and E2B if a key is set.")] = False,
) -> None:
    """Say what works here, what does not, and what to do. Exit code 0 means that the core works."""
    checks = examine(store=store, online=online)
    healthy = all(check.status == "ok" for check in checks if check.core)
    if as_json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _show(screen(None), checks, healthy)
    raise typer.Exit(0 if healthy else 1)


def _show(console: Console, checks: Sequence[Check], healthy: bool) -> None:
    table = Table(title="What works here", title_justify="left")
    for heading in ("part", "", "found"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.name, _MARKS[check.status], escape(check.detail))
    console.print(table)
    # Below the table and not wrapped: in a narrow column a command can't be copied.
    for check in checks:
        if check.remedy:
            console.print(f"[bold]{check.name}[/]: {escape(check.remedy)}", highlight=False, soft_wrap=True)
    console.print("The core works." if healthy else "[bold red]The core does not work:[/] see the lines marked broken.")


def _guarded(name: str, core: bool, look: Callable[[], Check]) -> Check:
    """A check that breaks is a finding, not the end of the examination."""
    try:
        return look()
    except Exception as error:
        return Check(name=name, status="broken", detail=_said(error), core=core, remedy=_REMEDIES.get(name, ""))


def _said(error: Exception) -> str:
    """An error, in a line."""
    return f"{type(error).__name__}: {error}"[:500]


# --- the machine ------------------------------------------------------------------------------------------------------


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform}"
    return Check(name="python", status="ok", detail=found, core=True)


def _store(store: str) -> Check:
    from fsspec.core import url_to_fs

    system, folder = url_to_fs(store)
    made = _first_missing(system, folder)
    probe = f"{folder.rstrip('/')}/.doctor-{uuid.uuid4().hex}"
    try:
        system.makedirs(folder, exist_ok=True)
        system.pipe_file(probe, b"metis")
        whole = system.cat_file(probe) == b"metis"
    finally:
        if system.exists(probe):
            system.rm_file(probe)
        if made is not None and system.exists(made):
            system.rm(made, recursive=True)
    if not whole:
        return Check(
            name="store", status="broken", detail=f"{store!r} gives back other bytes than were written", core=True
        )
    return Check(name="store", status="ok", detail=f"{store!r} can be written to", core=True)


def _first_missing(system: object, folder: str) -> str | None:
    """The topmost of the folders that the probe makes, so that it leaves nothing behind."""
    parts = folder.rstrip("/").split("/")
    for end in range(1, len(parts) + 1):
        path = "/".join(parts[:end])
        if path and not system.exists(path):  # type: ignore[attr-defined]
            return path
    return None


def _text_search() -> Check:
    from metis_agent.tools.search import CorpusSearch, Document

    with CorpusSearch.build([Document(id="1", text="東京は日本の首都です。 Tokyo")]) as corpus:
        found = [hit.source for word in ("東京", "tokyo") for hit in corpus.search(word, 1)]
    if found != ["1", "1"]:
        return Check(name="text search", status="broken", detail="the index does not find its document", core=True)
    return Check(name="text search", status="ok", detail=f"SQLite {sqlite3.sqlite_version} with FTS5", core=True)


def _images() -> Check:
    from tempfile import TemporaryDirectory

    from metis_agent.tools.images import load_image
    from metis_agent.tools.search.image_folder import ImageFolder

    with TemporaryDirectory() as folder:
        image = load_image(_PIXEL)
        image.save(os.path.join(folder, "pixel.png"))
        found = ImageFolder.build(folder)
        hits = [*found.search("pixel", 1), *found.similar(image, 1)]
    if [hit.source for hit in hits] != ["pixel.png"] * 2:
        return Check(name="image search", status="broken", detail="the index does not find its image")
    return Check(name="image search", status="ok", detail="images are loaded, and found by words and by likeness")


def _torch() -> Check:
    try:
        import torch
    except ImportError:
        return Check(
            name="torch", status="absent", detail="not installed", remedy="pip install 'langgraph-metis[train]'"
        )
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    if not torch.cuda.is_available():
        return Check(name="torch", status="ok", detail=f"{torch.__version__}, {threads}, no GPU")
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    float(torch.ones(8, device="cuda").sum())  # a driver that does not fit shows only here
    return Check(name="torch", status="ok", detail=f"{torch.__version__}, {threads}, GPU: {names}")


def _web_search() -> Check:
    from metis_agent.tools.search.web import web_search

    hits = web_search(retries=0).search("wikipedia", 3)
    return Check(name="web search", status="ok", detail=f"{len(hits)} results came back")


# --- packages ---------------------------------------------------------------------------------------------------------


def _packages() -> Check:
    """Those of the core."""
    wrong = _unmet(extra="")
    found = ", ".join(f"{name} {_version(name)}" for name in (_DISTRIBUTION, "langgraph", "langchain-core"))
    if wrong:
        remedy = "Install them with: pip install --upgrade langgraph-metis"
        return Check(name="packages", status="broken", detail="; ".join(wrong), remedy=remedy, core=True)
    return Check(name="packages", status="ok", detail=found, core=True)


def _namesake() -> list[Check]:
    """A warning where the other project is installed too: whichever came last has replaced files of the first."""
    if (found := _version(_NAMESAKE)) == "missing":
        return []
    detail = f"{_NAMESAKE} {found} is another project, and shares the package metis_agent and the command metis"
    remedy = (
        f"pip uninstall --yes {_NAMESAKE}, then pip install --force-reinstall --no-deps {_DISTRIBUTION}, "
        "which puts back the files that the two had in common"
    )
    return [Check(name=_NAMESAKE, status="broken", detail=detail, remedy=remedy)]


def _extra(name: str) -> Check:
    """Those of an extra, and the key of one that needs a key."""
    wrong = _unmet(extra=name)
    if wrong:
        remedy = f"pip install 'langgraph-metis[{name}]'"
        detail = f"for {_EXTRAS[name]}: {'; '.join(wrong)}"
        return Check(name=f"extra {name}", status="absent", detail=detail, remedy=remedy)
    detail = f"for {_EXTRAS[name]}"
    if name == "e2b" and not os.environ.get("E2B_API_KEY"):
        return Check(name="extra e2b", status="absent", detail=f"{detail}: no key", remedy="Set E2B_API_KEY to use it.")
    return Check(name=f"extra {name}", status="ok", detail=detail)


def _unmet(extra: str) -> list[str]:
    """The requirements of the package, or of one of its extras, that are not met."""
    from packaging.requirements import Requirement

    wrong = []
    for requirement in map(Requirement, requires(_DISTRIBUTION) or ()):
        marker = requirement.marker
        in_core = marker is None or marker.evaluate({"extra": ""})
        wanted = in_core if not extra else not in_core and marker is not None and marker.evaluate({"extra": extra})
        if not wanted:
            continue
        found = _version(requirement.name)
        if found == "missing":
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    return wrong


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


# --- sandboxes --------------------------------------------------------------------------------------------------------


def _sandboxes(online: bool) -> list[Check]:
    """One line for each backend, and one for what the `python` tool would do."""
    from metis_agent.tools.sandboxes import diagnose

    try:
        reports = diagnose(online=online)
    except Exception as error:  # whatever it is, the other checks still count
        return [Check(name="sandbox", status="broken", detail=_said(error))]
    lines = [_sandbox(report) for report in reports]
    if any(report.works for report in reports):
        best = next(report.backend for report in reports if report.works)
        first = "tries E2B first, as its key is set; else " if any(map(_not_tried, reports)) else ""
        tool = Check(name="python tool", status="ok", detail=f"{first}runs code in {best}")
        return [*lines, tool, _guarded("python images", False, partial(_python_images, best))]
    remedy = (
        "Install bubblewrap (apt-get install bubblewrap), or use Linux 5.13 or newer with Landlock; in a container, "
        "allow user namespaces or Landlock in its seccomp profile; or set E2B_API_KEY."
    )
    return [*lines, Check(name="python tool", status="absent", detail="nothing here contains code", remedy=remedy)]


def _sandbox(report: BackendReport) -> Check:
    name = f"sandbox {report.backend}"
    if report.works:
        return Check(name=name, status="ok", detail="contains code: the self-test's attacks failed")
    detail = "; ".join(report.problems)
    if _not_tried(report):
        return Check(name=name, status="absent", detail=detail, remedy="Try it with: metis doctor --online")
    if report.backend == "e2b" and os.environ.get("E2B_API_KEY"):
        remedy = "Unset E2B_API_KEY to go without E2B; a sandbox of this machine is used meanwhile, if one works."
        return Check(name=name, status="broken", detail=detail, remedy=remedy)
    return Check(name=name, status="absent", detail=detail)


def _not_tried(report: BackendReport) -> bool:
    from metis_agent.tools.sandboxes.choose import NOT_TRIED

    return NOT_TRIED in report.problems


def _python_images(backend: str) -> Check:
    """Whether code gets images, and what it draws comes back."""
    from metis_agent.tools.sandboxes import open_sandbox
    from metis_agent.tools.sandboxes.base import InputImage

    with open_sandbox(backend=cast("Backend", backend)) as sandbox, sandbox.open() as session:
        execution = session.run(_DRAWS, timeout=60, images={"image_1": InputImage(source=_PIXEL)})
    found, lacking = execution.stdout.split(), {"numpy", "PIL", "matplotlib"} - set(execution.stdout.split())
    detail = f"code can use {', '.join(found) or 'the standard library'}"
    if execution.images and not lacking:
        return Check(name="python images", status="ok", detail=f"{detail}; images go in and come back")
    why = "; ".join((*execution.notes, *(f"{name} is missing" for name in sorted(lacking))))
    remedy = "pip install 'langgraph-metis[images]' numpy matplotlib"
    return Check(name="python images", status="absent", detail=f"{detail}; {why}", remedy=remedy)
