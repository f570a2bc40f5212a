"""What `metis doctor` says of the sandboxes: each is attacked, and the best one draws an image."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, cast

from metis_agent.cli.doctor_check import Check, guarded, said

if TYPE_CHECKING:
    from metis_agent.tools.sandboxes import Backend, BackendReport

__all__ = ["PIXEL", "sandboxes"]

PIXEL = (
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


def sandboxes(online: bool) -> list[Check]:
    """One line for each backend, and one for what the `python` tool would do."""
    from metis_agent.tools.sandboxes import diagnose

    try:
        reports = diagnose(online=online)
    except Exception as error:  # whatever it is, the other checks still count
        return [Check(name="sandbox", status="broken", detail=said(error))]
    lines = [_sandbox(report) for report in reports]
    if any(report.works for report in reports):
        best = next(report.backend for report in reports if report.works)
        first = "tries E2B first, as its key is set; else " if any(map(_not_tried, reports)) else ""
        tool = Check(name="python tool", status="ok", detail=f"{first}runs code in {best}")
        return [*lines, tool, guarded("python images", False, partial(_python_images, best))]
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
    from metis_agent.tools.sandboxes.pictures import InputImage

    with open_sandbox(backend=cast("Backend", backend)) as sandbox, sandbox.open() as session:
        execution = session.run(_DRAWS, timeout=60, images={"image_1": InputImage(source=PIXEL)})
    found, lacking = execution.stdout.split(), {"numpy", "PIL", "matplotlib"} - set(execution.stdout.split())
    detail = f"code can use {', '.join(found) or 'the standard library'}"
    if execution.images and not lacking:
        return Check(name="python images", status="ok", detail=f"{detail}; images go in and come back")
    why = "; ".join((*execution.notes, *(f"{name} is missing" for name in sorted(lacking))))
    remedy = "pip install 'langgraph-metis[images]' numpy matplotlib"
    return Check(name="python images", status="absent", detail=f"{detail}; {why}", remedy=remedy)
