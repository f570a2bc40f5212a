"""One run as the page's browser shows it: its question, its decisions, and its messages in order.

From a `Trajectory` to plain values; every text in it is `clipped`, and nothing is HTML.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from metis_agent.hdpo.report.pictures import Pictures
from metis_agent.hdpo.report.text import clipped
from metis_agent.recording.images import ImageStore
from metis_agent.types import GateDecision, ToolOutcome, Trajectory

__all__ = ["FIELD", "transcript_of"]

FIELD = 20_000
"""Characters that one field may have."""
STEPS = 200
"""Messages that one run may have."""
SMALL = 300


def transcript_of(run: Trajectory, pictures: Pictures, store: ImageStore) -> dict[str, Any]:
    """Everything that the page shows of a run; keys that would be empty are left out."""
    steps = _steps(run, pictures, store)
    whole = {
        "id": clipped(run.id, SMALL),
        "question": clipped(run.question.text, FIELD),
        "reference": None if run.question.answer is None else clipped(run.question.answer, FIELD),
        "verifier": run.question.verifier,
        "answer": clipped(run.answer, FIELD),
        "error": clipped(run.error, FIELD),
        "seconds": _number(run.seconds),
        "cost": _number(run.cost),
        "started": _number(run.started_at),
        "metadata": _pairs(run.metadata) + _pairs(run.question.metadata),
        "decisions": [_decision(decision) for decision in run.decisions[:STEPS]],
        "steps": steps[:STEPS],
        "more": len(steps) - STEPS if len(steps) > STEPS else 0,
    }
    return {key: value for key, value in whole.items() if value not in (None, "", [], 0)}


def _decision(decision: GateDecision) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "allowed": [clipped(name, SMALL) for name in decision.allowed[:50]],
        "gate": clipped(" ".join(filter(None, (decision.gate, decision.version))), SMALL),
        "reason": clipped(decision.reason, 2000),
    }
    if decision.probabilities:
        shown["probabilities"] = [
            [clipped(name, SMALL), _number(value)] for name, value in list(decision.probabilities.items())[:50]
        ]
    for name in ("threshold", "propensity"):
        if (value := getattr(decision, name)) is not None:
            shown[name] = _number(value)
    if decision.required:
        shown["required"] = True
    if decision.shadow:
        shown["shadow"] = _pairs(decision.shadow)
    return shown


def _steps(run: Trajectory, pictures: Pictures, store: ImageStore) -> list[dict[str, Any]]:
    by_id = {outcome.call_id: outcome for outcome in run.outcomes}
    steps = [_step(message, by_id, pictures, store) for message in run.messages]
    # A record without messages still says which tools ran.
    return steps or [
        {"role": "tool", "parts": [{"text": clipped(outcome.content, FIELD)}], **_ran(outcome),
         "arguments": _pairs(outcome.arguments)}
        for outcome in run.outcomes
    ]  # fmt: skip


def _step(
    message: Mapping[str, Any], outcomes: Mapping[str, ToolOutcome], pictures: Pictures, store: ImageStore
) -> dict[str, Any]:
    fields = message.get("data", message)
    if not isinstance(fields, Mapping):
        fields = {}
    step: dict[str, Any] = {"role": clipped(str(message.get("type", "")), SMALL)}
    if parts := _parts(fields.get("content"), pictures, store):
        step["parts"] = parts
    calls = [*_listed(fields.get("tool_calls")), *_listed(fields.get("invalid_tool_calls"))]
    if calls:
        step["calls"] = [_call(call) for call in calls[:STEPS] if isinstance(call, Mapping)]
    if (outcome := outcomes.get(str(fields.get("tool_call_id", "")))) is not None:
        step |= _ran(outcome)
    elif fields.get("name"):
        step["tool"] = clipped(str(fields["name"]), SMALL)
    return step


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call.get("args")
    shown = {"tool": clipped(str(call.get("name")), SMALL), "arguments": _pairs(arguments)}
    return shown | ({"error": clipped(str(call["error"]), FIELD)} if call.get("error") else {})


def _ran(outcome: ToolOutcome) -> dict[str, Any]:
    return {
        "tool": clipped(outcome.tool, SMALL), "status": outcome.status, "seconds": _number(outcome.seconds),
        "cost": _number(outcome.cost),
    }  # fmt: skip


def _parts(content: object, pictures: Pictures, store: ImageStore) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"text": clipped(content, FIELD)}] if content else []
    parts: list[dict[str, Any]] = []
    for block in _listed(content)[:STEPS]:
        if isinstance(block, Mapping) and block.get("type") in ("image", "image_url"):
            parts.append(pictures.part_of(block, store))
        elif isinstance(block, Mapping) and isinstance(block.get("text"), str):
            parts.append({"text": clipped(block["text"], FIELD)})
        else:
            parts.append({"text": clipped(block, FIELD) if isinstance(block, str) else _json(block)})
    return parts


def _pairs(value: object) -> list[list[str]]:
    """Names and values of a mapping, each value a text: what was a text stays as it was written."""
    if value in (None, "", {}):
        return []
    if not isinstance(value, Mapping):
        return [["", clipped(value, FIELD) if isinstance(value, str) else _json(value)]]
    return [
        [clipped(str(key), SMALL), clipped(inner, FIELD) if isinstance(inner, str) else _json(inner)]
        for key, inner in list(value.items())[:100]
    ]


def _json(value: object) -> str:
    return clipped(json.dumps(value, ensure_ascii=False, indent=1, default=str), FIELD)


def _number(value: float) -> float | None:
    """Six digits; `None` for what JSON has no word for."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return number if abs(number) >= 1e6 else float(f"{number:.6g}")


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
