"""A gate's folder that somebody else made, its hashes recomputed: what does not fit is refused before it decides."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.messages import HumanMessage

from metis_agent.errors import CheckpointError, MetisError
from metis_agent.gates.artefact import GATE_FILE, TENSOR_FILE, description_hash, file_hash
from metis_agent.gates.features import BUCKETS
from metis_agent.gates.policy import PolicyGate
from metis_agent.types import GateRequest, ToolSpec

SHAPES = {
    "idf": [BUCKETS], "text_weights": [2, BUCKETS], "number_weights": [2, 11], "number_mean": [11],
    "number_scale": [11], "bias": [2],
}  # fmt: skip
DECISION = {
    "head_temperature": [1.0, 1.0], "saving": [0.0, 0.0], "mean_accuracy": [0.5, 0.5], "trust": 1.0, "beta": 0.0,
    "temperature": 1.0,
}  # fmt: skip
POLICY = {
    "context": False, "draft": [], "log": [], "missing": [], "number_weight": 1.0, "clip": 3.0, "buckets": BUCKETS,
}  # fmt: skip


def write(
    folder: Path,
    *,
    tensors: dict[str, Any] | None = None,
    header: Any = None,
    length: int | None = None,
    **changes: Any,
) -> Path:
    named = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} | (tensors or {})
    entries, body = {}, b""
    for name, values in named.items():
        raw = np.asarray(values, "<f4").tobytes()
        entries[name] = {
            "dtype": "F32", "shape": list(np.shape(values)), "data_offsets": [len(body), len(body) + len(raw)],
        }  # fmt: skip
        body += raw
    head = header if isinstance(header, bytes) else json.dumps(entries | (header or {})).encode()
    (folder / TENSOR_FILE).write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + body)
    description: dict[str, Any] = {
        "format": 1, "kind": "features", "version": "x", "tools": [{"name": "search"}], "threshold": {"value": 0.5},
        "files": {TENSOR_FILE: file_hash(folder / TENSOR_FILE)}, "policy": POLICY, "decision": DECISION, **changes,
    }  # fmt: skip
    description["hash"] = description_hash(description)
    (folder / GATE_FILE).write_text(json.dumps(description))
    return folder


def test_as_it_should_be_it_decides(tmp_path: Path) -> None:
    gate = PolicyGate(write(tmp_path))
    asked = GateRequest(messages=[HumanMessage("What is 2 + 3?")], tools=(ToolSpec(name="search"),))
    assert gate.decide(asked).probabilities == {"search": 0.5}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path: Path, name: str, value: float) -> None:
    values = np.ones(SHAPES[name])
    values[(-1,) * values.ndim] = value
    with pytest.raises(CheckpointError, match="not finite numbers"):
        PolicyGate(write(tmp_path, tensors={name: values}))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("change", [1, -1])
def test_tensors_of_other_sizes_are_refused(tmp_path: Path, name: str, change: int) -> None:
    shape = SHAPES[name]
    for axis in range(len(shape)):
        other = [size + change * (place == axis) for place, size in enumerate(shape)]
        with pytest.raises(CheckpointError, match=r"sizes that don't fit|lacks a part"):
            PolicyGate(write(tmp_path, tensors={name: np.ones(other)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"number_scale": np.zeros(11)}},
        {"tensors": {"number_scale": -np.ones(11)}},
        {"policy": POLICY | {"clip": 0.0}},
        {"policy": POLICY | {"clip": float("nan")}},
        {"policy": POLICY | {"missing": [99]}},
        {"policy": POLICY | {"missing": 3}},
        {"policy": POLICY | {"draft": None}},
        {"policy": [1]},
        {"decision": DECISION | {"head_temperature": [0.0, 1.0]}},
        {"decision": DECISION | {"head_temperature": [1.0]}},
        {"decision": DECISION | {"temperature": 0}},
        {"decision": DECISION | {"beta": float("nan")}},
        {"decision": DECISION | {"trust": "1"}},
        {"decision": DECISION | {"step_saving": 0.5}},
        {"decision": DECISION | {"step_saving": [0.5, None]}},
        {"decision": DECISION | {"most_to_come": 0.0}},
        {"decision": DECISION | {"most_to_come": "3"}},
        {"decision": DECISION | {"most_to_come": 3.0}},  # and no weights of that head
        {"decision": None},
        {"decision": [1.0]},
        {"threshold": None},
        {"threshold": {"value": "0.5"}},
        {"threshold": {"value": float("nan")}},
        {"threshold": {"value": True}},
        {"threshold": {"value": 2}},
        {"files": [TENSOR_FILE]},
        {"files": {TENSOR_FILE: 3}},
        {"files": {"../x": "0"}},
        {"tools": []},
        {"tools": ["search"]},
        {"tools": [{"name": "search"}, {"name": "search"}]},
        {"kind": ["features"]},
        {"version": None},
        {"header": b"[]"},
        {"header": b"[" * 100_000},
        {"header": b"{"},
        {"header": {"bias": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}},
        {"header": {"bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**60]}}},
        {"header": {"bias": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}},
        {"header": {"bias": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}},
        {"header": {"bias": [1]}},
        {"length": 2**62},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        PolicyGate(write(tmp_path, **changes))


HOSTILE = (
    None, True, -1, 0, 2**70, 10**400, 1e308, float("nan"), float("-inf"), "", "\ud83d", "x" * 70_000,
    "../../etc/passwd", [], {}, [[]], [None, "a"], {"a": {}}, [10**9] * 2,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, the outer ones first."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_anything_in_any_place_of_a_description(tmp_path: Path, every: int) -> None:
    """It is refused by name, or decides with numbers that are some; never a raw error, never hours or gigabytes."""
    write(tmp_path)
    whole = json.loads((tmp_path / GATE_FILE).read_text())
    asked = GateRequest(messages=[HumanMessage("What is 2 + 3?")], tools=(ToolSpec(name="search"),))
    refused, number = 0, 0
    for path in places(whole):
        for value in HOSTILE:
            number += 1
            if number % every:
                continue
            changed = json.loads(json.dumps(whole))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            if path[0] != "hash":
                changed["hash"] = description_hash(changed)
            (tmp_path / GATE_FILE).write_text(json.dumps(changed))
            try:
                decided = PolicyGate(tmp_path).decide(asked)
            except MetisError:
                refused += 1
                continue
            assert all(0 <= probability <= 1 for probability in (decided.probabilities or {}).values()), (path, value)
    assert refused > number / every / 2


def test_a_description_that_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / GATE_FILE)
    with pytest.raises(CheckpointError, match="is no file of at most"):
        PolicyGate(tmp_path)
    (tmp_path / GATE_FILE).unlink()
    (tmp_path / GATE_FILE).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no file of at most"):
        PolicyGate(tmp_path)
    (tmp_path / GATE_FILE).unlink()
    (tmp_path / GATE_FILE).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is no JSON"):
        PolicyGate(tmp_path)
