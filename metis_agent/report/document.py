"""What every page of ours is made of: one HTML file that loads nothing, and can't, written whole or not at all.

Its policy (`Content-Security-Policy`) allows just its own style and script, by their hashes, and images from `data:`:
what a record holds can't run, and can't reach out. Shared by the report and the audit.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path

from metis_agent.errors import StorageError
from metis_agent.formats import atomic_path
from metis_agent.report.words import clipped

__all__ = ["packaged", "page_head", "policy", "version", "write_page"]


def packaged(name: str, package: str = "metis_agent.report") -> str:
    """The text of a file that lies in a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def policy(style: str, script: str = "") -> str:
    """What a page with this style and this script may do."""
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; {scripts}img-src data:; base-uri 'none'; form-action 'none'"
    )


def page_head(title: str, style: str, script: str = "") -> str:
    """A page up to its body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(clipped(title, 200))}</title>\n<style>{style}</style>\n</head>\n"
    )


def write_page(out: Path, pieces: Iterable[str]) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: it can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as draft, draft.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(pieces)
    except OSError as error:
        raise StorageError(f"{str(out)!r} can't be written: {error}. Give another --out.") from error


def version() -> str:
    """Of this library; "" where it runs from a folder."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("langgraph-metis")
    except PackageNotFoundError:
        return ""


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
