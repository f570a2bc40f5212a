"""What `metis doctor` says of packages: those that the core requires, and those of each extra."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, requires, version

from metis_agent.cli.doctor_check import Check

__all__ = ["EXTRAS", "extra", "packages", "unmet"]

_DISTRIBUTION = "langgraph-metis"
EXTRAS = {
    "images": "images that users send, and image search",
    "search": "search of the web",
    "tantivy": "a faster index for text search",
    "train": "training, and local models",
    "langchain": "the gate as middleware of create_agent",
    "vllm": "models served by vLLM",
    "e2b": "the python tool in E2B's cloud",
    "math": "answers that are mathematics",
    "serve": "serving a decision model by transformers",
}
"""What each extra is for."""


def packages() -> Check:
    """Those of the core."""
    wrong = unmet(extra="")
    found = ", ".join(f"{name} {_version(name)}" for name in (_DISTRIBUTION, "langgraph", "langchain-core"))
    if wrong:
        remedy = "Install them with: pip install --upgrade langgraph-metis"
        return Check(name="packages", status="broken", detail="; ".join(wrong), remedy=remedy, core=True)
    return Check(name="packages", status="ok", detail=found, core=True)


def extra(name: str) -> Check:
    """Those of an extra, and the key of one that needs a key."""
    wrong = unmet(extra=name)
    if wrong:
        remedy = f"pip install 'langgraph-metis[{name}]'"
        detail = f"for {EXTRAS[name]}: {'; '.join(wrong)}"
        return Check(name=f"extra {name}", status="absent", detail=detail, remedy=remedy)
    detail = f"for {EXTRAS[name]}"
    if name == "e2b" and not os.environ.get("E2B_API_KEY"):
        return Check(name="extra e2b", status="absent", detail=f"{detail}: no key", remedy="Set E2B_API_KEY to use it.")
    return Check(name=f"extra {name}", status="ok", detail=detail)


def unmet(extra: str) -> list[str]:
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
