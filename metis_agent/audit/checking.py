"""A person's check of the judge: a page with pairs of answers to click through, and the file that comes of it.

The pairs belong to turns drawn at random from those that the judge ruled on, whatever it said, so what the person says
corrects the judge's share without bias (`estimates.corrected_ratio`). The page does not show the judge's verdict, and
which of the two answers was sent is shown in random order: a person who knows either is led by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from metis_agent.audit.agreement import Agreement, pair_of
from metis_agent.audit.run import Findings
from metis_agent.errors import InputError
from metis_agent.report.document import packaged, page_head
from metis_agent.report.words import clipped, html

__all__ = ["check_page", "read_checks"]

_SHOWN = 6_000


def check_page(findings: Findings, turns: int) -> str:
    """The page for so many turns.

    Raises:
        InputError: no verdict came from a judge, so there is nothing to check.
    """
    items = list(_items(findings, turns))
    if not items:
        raise InputError("No verdict of this audit came from a judge, so there is nothing for a person to check.")
    shown = "".join(_item(number, item, len(items)) for number, item in enumerate(items, 1))
    script = packaged("check.js", "metis_agent.audit")
    head = page_head("Check the judge", packaged("page.css") + packaged("audit.css", "metis_agent.audit"), script)
    return (
        f"{head}<body><header class=page><h1>Would both tell the user the same?</h1><p class=about>{len(items)} pairs "
        "of answers to the same message. One was sent; the other is what the model said without the tool calls that "
        "followed. Which is which is not shown, and does not matter. When you are through, save the file and run the "
        "audit again with <code>--checked FILE</code>.</p></header><main>"
        f"<ol class=pairs>{shown}</ol><p class=save><button type=button id=save>Save the verdicts</button> "
        "<span id=said role=status>0 said</span></p></main>"
        f"<script>{script}</script></body></html>\n"
    )


def read_checks(path: Path) -> dict[tuple[str, int], bool | None]:
    """A person's verdicts, by turn and state; `None` where they could not say.

    Raises:
        InputError: the file can't be read, or is not what the page saves.
    """
    found: dict[tuple[str, int], bool | None] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the checks {str(path)!r} can't be read: {error}. Save them from the page.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            agrees = row["agrees"]
            if not (agrees is None or isinstance(agrees, bool)):
                raise ValueError(f"agrees is {agrees!r}")
            found[str(row["turn"]), int(row["state"])] = agrees
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{str(path)!r}, line {number}, is no verdict: {error}. A line is {{"turn": "...", "state": 0, '
                '"agrees": true}, with false or null where they differ or nobody can say.'
            ) from error
    return found


def _items(findings: Findings, turns: int) -> Iterator[dict[str, Any]]:
    """The judged states of the first turns of the sample, which is in random order."""
    left = turns
    for turn in findings.turns:
        judged = _judged(findings.agreements[turn.id])
        if not judged or not turn.decided:
            continue
        if left == 0:
            return
        left -= 1
        recorded = findings.recorded[turn.id]
        for k in judged:
            pair = pair_of(recorded, findings.probes[turn.id, k, "answer"])
            answers = [pair.own, pair.probe]
            if _coin(f"{turn.id}/{k}"):
                answers.reverse()
            yield {"turn": turn.id, "state": k, "context": pair.context, "question": pair.question, "answers": answers}


def _judged(agreements: Sequence[Agreement]) -> list[int]:
    return [k for k, it in enumerate(agreements) if it.source == "judge" and it.agrees is not None]


def _coin(text: str) -> bool:
    """Fair, and the same for the same text."""
    return bool(hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] & 1)


def _item(number: int, item: Mapping[str, Any], count: int) -> str:
    context = f"<details><summary>The conversation before</summary><p class=said>{_text(item['context'])}</p></details>"
    answers = "".join(f"<div class=answer><p class=said>{_text(answer)}</p></div>" for answer in item["answers"])
    choices = "".join(
        f'<label class=chip><input type=radio name="p{number}" value="{value}"> {said}</label>'
        for value, said in (("true", "The same"), ("false", "Not the same"), ("null", "I can't say"))
    )
    return (
        f'<li data-turn="{html(item["turn"], 2000)}" data-state="{item["state"]}"><h2>{number} of {count}</h2>'
        f"{context if item['context'] else ''}<p class=asked>{_text(item['question'])}</p>"
        f"<div class=answers>{answers}</div><fieldset><legend>A user who reads only one of them learns</legend>"
        f"{choices}</fieldset></li>"
    )


def _text(text: str) -> str:
    return escape(clipped(text, _SHOWN))
