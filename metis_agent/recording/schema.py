"""One trajectory as one line of JSON, and back.

Stands between the recorder, which makes trajectories, and the store, which keeps lines. Rules of the format:

- A line is one JSON object with `"schema": 1` first; it holds no line break, so a file of them is JSONL.
- A field that this version doesn't know is ignored. So a field may be added, with a default, without a new
  version; a field that is renamed or changes its meaning needs one, and a step in `MIGRATIONS`.
- Base64 of an image may stand there as `image:sha256:<hex>`, by which the store keeps it (`externalise_images`).
- Log-probabilities and other numbers that are not finite are written `NaN`, `Infinity` and `-Infinity`, as
  Python's own `json` does: `null` would not come back as what it was.
- Free-form values (`metadata`, `arguments`, `messages`) come back as JSON has them: a tuple or set as a list,
  a key as a string. A value with no JSON form is refused when written, never turned into its `repr`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from decimal import Decimal
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json, to_jsonable_python

from metis_agent.errors import InputError, SchemaVersionError
from metis_agent.types import Branch, GateDecision, Question, ToolOutcome, Trajectory, TrajectoryStatus

__all__ = ["MIGRATIONS", "SCHEMA_VERSION", "dumps", "loads"]

SCHEMA_VERSION = 1
"""The version that this code writes, and the newest that it reads."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Old version -> function that turns a record of that version into one of the next version."""


def dumps(trajectory: Trajectory) -> str:
    """Return the trajectory as one line of JSON, without a line break at the end.

    Raises:
        InputError: it holds a value that JSON has no form for.
    """
    try:
        try:
            body = to_json(trajectory, inf_nan_mode="constants", fallback=_plain).decode()
        except ValueError:
            body = _escaped(trajectory)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"trajectory {trajectory.id!r} can't be written as JSON: {error}. Metadata, arguments and "
            "messages hold only what JSON can; convert the value before recording it."
        ) from error
    return f'{{"schema":{SCHEMA_VERSION},{body[1:]}'


def loads(line: str | bytes) -> Trajectory:
    """Return the trajectory that `dumps` wrote, by this version or an earlier one.

    Raises:
        InputError: the line is not JSON, or not a trajectory.
        SchemaVersionError: a newer Metis wrote it.
    """
    if _is_current(line):
        try:
            return _trajectory().validate_json(line)
        except ValidationError:
            pass  # the careful path below finds the reason, or copes (lone surrogates)
    record = _migrate(_parse(line))
    try:
        return _trajectory().validate_python(record)
    except ValidationError as error:
        raise InputError(f"record {record.get('id')!r} is not a trajectory: {_summary(error)}.") from error


def loads_outcome(line: str | bytes) -> Trajectory:
    """Return the trajectory without messages, model calls and tools: what scoring needs, several times as fast.

    Raises:
        InputError, SchemaVersionError: as `loads`.
    """
    if _is_current(line):
        try:
            return Trajectory(**vars(_outcome().validate_json(line)))
        except ValidationError:
            pass
    return replace(loads(line), messages=(), calls=(), history=(), tools=())


def identity(line: str | bytes) -> tuple[str, TrajectoryStatus]:
    """Return id and status of a line without building the trajectory: what a resumed run needs.

    Raises:
        InputError, SchemaVersionError: as `loads`.
    """
    if _is_current(line):
        try:
            head = _head().validate_json(line)
        except ValidationError:
            pass
        else:
            return head.id, head.status
    trajectory = loads(line)
    return trajectory.id, trajectory.status


def is_json(line: str | bytes) -> bool:
    """True where the line is whole JSON, whatever it holds; a torn line is not."""
    try:
        json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class _Head:
    id: str
    status: TrajectoryStatus


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """A trajectory's fields but for messages, model calls and tools; `TrajectoryStore` tests compare the two."""

    id: str
    question: Question
    branch: Branch = "free"
    answer: str = ""
    decisions: tuple[GateDecision, ...] = ()
    outcomes: tuple[ToolOutcome, ...] = ()
    status: TrajectoryStatus = "finished"
    error: str = ""
    seconds: float = 0.0
    started_at: float = 0.0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    conversation: str = ""
    user: str = ""


@cache
def _outcome() -> TypeAdapter[_Outcome]:
    return TypeAdapter(_Outcome)


@cache
def _trajectory() -> TypeAdapter[Trajectory]:
    return TypeAdapter(Trajectory)


@cache
def _head() -> TypeAdapter[_Head]:
    return TypeAdapter(_Head)


def _plain(value: object) -> object:
    """Return a mapping of any kind as a dict; nothing else that reaches here has a JSON form."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _escaped(trajectory: Trajectory) -> str:
    """Write with escapes only: a lone surrogate (half an emoji, cut by a tokenizer) is no UTF-8."""
    return json.dumps(trajectory, default=_fields, separators=(",", ":"))


def _fields(value: object) -> object:
    return vars(value) if is_dataclass(value) else to_jsonable_python(value, fallback=_plain)


def _integer(digits: str) -> int:
    # Python's int() stops at 4,300 digits, which the writer does not.
    return int(digits) if len(digits) < 4300 else int(Decimal(digits))


def _is_current(line: str | bytes) -> bool:
    prefix = f'{{"schema":{SCHEMA_VERSION},'
    return line.startswith(prefix) if isinstance(line, str) else line.startswith(prefix.encode())


def _parse(line: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a line of JSON: {error or type(error).__name__}.") from error
    if not isinstance(record, dict):
        raise InputError(f"a trajectory is a JSON object; this line holds a {type(record).__name__}.")
    return record


def _migrate(record: dict[str, Any]) -> dict[str, Any]:
    version = record.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(f"schema is {version!r}; every trajectory carries its version, an integer from 1.")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"record {record.get('id')!r} has schema {version!r}; this Metis reads up to {SCHEMA_VERSION}. "
            "Upgrade langgraph-metis, or read it with the version that wrote it."
        )
    while version < SCHEMA_VERSION:
        record = MIGRATIONS[version](record)
        version += 1
    return record


def _summary(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where or 'record'}: {first['msg']}{more}"
