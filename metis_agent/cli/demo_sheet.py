"""The gallery's before and after as a page: the picture, what the model sees of it, the call, the crop, the answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_agent.image_blocks import image_source
from metis_agent.tools.images import load_image
from metis_agent.types import Question, Trajectory

if TYPE_CHECKING:
    from metis_agent.evaluation.agents import Measurement

__all__ = ["write_sheet"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222; }
section { display: grid; grid-template-columns: 16rem 1fr 1fr; gap: 1.5rem; padding: 1.5rem 0; }
section + section { border-top: 1px solid #ccc; }
h2, h3 { font-size: 1rem; margin: 0 0 .5rem; }
img { display: block; width: 128px; height: 128px; } figure { margin: 0 .5rem .5rem 0; display: inline-block; }
figcaption, code { font-size: .8rem; } .seen img { image-rendering: pixelated; }
code { display: block; overflow-wrap: anywhere; margin-bottom: .5rem; }
.right { color: #17622f; } .wrong { color: #9c1c1c; }
"""


def write_sheet(path: Path, before: Measurement, after: Measurement, *, of_each: int = 2) -> Path:
    """Write a page that needs nothing beside itself, with the first questions of each kind.

    Args:
        path: Of the page.
        before: The cold start.
        after: The trained policy, on the same questions.
        of_each: Questions of each kind.
    """
    later = {run.question.id: run for run in after.trajectories}
    shown: dict[str, list[str]] = {}
    for run in before.trajectories:
        parts = shown.setdefault(run.question.kind, [])
        if len(parts) < of_each:
            parts.append(_section(run, later[run.question.id]))
    body = "".join(part for parts in shown.values() for part in parts)
    title = "The same pictures, before and after HDPO"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1>{body}</html>\n",
        encoding="utf-8",
    )
    return path


def _section(before: Trajectory, after: Trajectory) -> str:
    question = before.question
    return (
        f"<section><div><h2>{escape(question.text)}</h2><p>{escape(question.kind)}</p>{_picture(question)}</div>"
        f"{_run('Cold start', before)}{_run('After HDPO', after)}</section>"
    )


def _picture(question: Question) -> str:
    source = question.metadata["images"][0]
    return (
        _figure(source, "the picture") + f'<span class="seen">{_figure(_seen(source), "as the model sees it")}</span>'
    )


def _run(title: str, run: Trajectory) -> str:
    calls = "".join(f"<code>{escape(_call(outcome.tool, outcome.arguments))}</code>" for outcome in run.outcomes)
    crops = "".join(_figure(_seen(source), "what it got to see") for source in _tool_images(run))
    right = run.answer == run.question.answer
    verdict = f'<p class="{"right" if right else "wrong"}">{escape(run.answer)} {"✓" if right else "✗"}</p>'
    return f'<div class="seen"><h3>{title}</h3>{calls or "<p>At a glance:</p>"}{crops}{verdict}</div>'


def _call(tool: str, arguments: Mapping[str, Any]) -> str:
    return f"{tool}({', '.join(map(str, arguments.values()))})"


def _tool_images(run: Trajectory) -> list[str | bytes]:
    contents = [message["data"]["content"] for message in run.messages if message["type"] == "tool"]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [source for block in blocks if isinstance(block, dict) and (source := image_source(block)) is not None]


def _seen(source: str | bytes) -> str:
    """An image at the size at which the model sees it, as a data URI."""
    from metis_agent.worlds.gallery.pictures import VIEW

    file = io.BytesIO()
    load_image(source).convert("RGB").resize((VIEW, VIEW), 3).save(file, "PNG")  # 3: BICUBIC, as the processor does
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{escape(uri)}" alt=""><figcaption>{caption}</figcaption></figure>'
