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
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metis_agent.cli.doctor_check import Check, guarded
from metis_agent.cli.doctor_packages import EXTRAS, extra, packages, unmet
from metis_agent.cli.doctor_sandboxes import PIXEL, sandboxes

__all__ = ["Check", "doctor", "examine"]

_MARKS = {"ok": "[green]works[/]", "absent": "[yellow]absent[/]", "broken": "[bold red]broken[/]"}


def examine(*, store: str = "runs", online: bool = False) -> list[Check]:
    """Look at everything.

    Args:
        store: where trajectories are to be written; a folder or an fsspec URL. What is written is removed again.
        online: also try the web search, and E2B where a key is set.
    """
    checks = [guarded("python", True, _python), packages()]
    checks.append(guarded("store", True, lambda: _store(store)))
    checks.append(guarded("text search", True, _text_search))
    checks += sandboxes(online)
    if unmet(extra="images") == []:
        checks.append(guarded("image search", False, _images))
    checks += [guarded(f"extra {name}", False, partial(extra, name)) for name in EXTRAS]
    checks.append(guarded("torch", False, _torch))
    if online:
        checks.append(guarded("web search", False, _web_search))
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
        _show(Console(), checks, healthy)
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


# --- what is looked at -----------------------------------------------------------------------------------------------


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
        image = load_image(PIXEL)
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
