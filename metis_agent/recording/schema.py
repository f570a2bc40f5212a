"""One trajectory as one line of JSON, and back.

Stands between the recorder, which makes trajectories, and the store, which keeps lines. Rules of the format:

- A line is one JSON object with `"schema": 1` first; it holds no line break, so a file of them is JSONL.
- A field that this version doesn't know is ignored. So a field may be added, with a default, without a new
  version; a field that is renamed or changes its meaning needs one, and a step in `MIGRATIONS`.
- Base64 of an image may stand there as `image:sha256:<hex>`, by which the store keeps it (`externalise_images`), and
  the tools that were offered as `[{"tools": "sha256:<hex>"}]` (`ToolSets`).
- It is JSON for every reader: numbers that are not finite are the texts "NaN", "Infinity" and "-Infinity" (a field that
  holds numbers reads them as such; `null` would not come back as what it was), no line separator of any kind stands
  in it, and nothing nests deeper than 250 levels. Earlier lines hold bare `NaN` and are read too.
- Free-form values (`metadata`, `arguments`, `messages`) come back as JSON has them: a tuple or set as a list,
  a key as a string. A value with no JSON form is refused when written, never turned into its `repr`; `plain` puts a
  note in its place. An integer of more than 4,300 digits is read as its digits: Python can't print it otherwise.
- What a line may cost to read is bounded: by its length (the store), its depth, and how many values it holds.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from inspect import signature
from typing import Any, cast, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator, core_schema, to_json, to_jsonable_python

from metis_agent.errors import InputError, SchemaVersionError
from metis_agent.types import (
    Branch,
    GateDecision,
    OutcomeStatus,
    Question,
    ToolOutcome,
    Trajectory,
    TrajectoryStatus,
)

__all__ = ["MIGRATIONS", "SCHEMA_VERSION", "dumps", "loads", "plain"]

SCHEMA_VERSION = 1
"""The version that this code writes, and the newest that it reads."""

_LINE_SEPARATORS = (("\u2028", "\\u2028"), ("\u2029", "\\u2029"), ("\x85", "\\u0085"))
_DEEPEST = 250
"""Levels that are written; what is read may have as many, and those of the record around them."""
_PLAIN_DEPTH = 100
_MOST_DIGITS = 4300
_MOST_VALUES = 8_000_000
"""Values of one line that are read: tokens and all. A value takes up to a hundred times the memory of its text."""
_LARGE = 2**20
"""Bytes from which on a line's values are counted."""
_FAILING_FAST = {"list", "tuple", "set"} | (
    {"dict"} if "fail_fast" in signature(core_schema.dict_schema).parameters else set()
)

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Old version -> function that turns a record of that version into one of the next version."""


def dumps(trajectory: Trajectory) -> str:
    """Return the trajectory as one line of JSON, without a line break at the end.

    Raises:
        InputError: it holds a value that JSON has no form for, or a branch or status that no reader takes.
    """
    for what, value, known in (
        ("branch", trajectory.branch, Branch),
        ("status", trajectory.status, TrajectoryStatus),
        *(("status of a call", outcome.status, OutcomeStatus) for outcome in trajectory.outcomes),
    ):
        if value not in get_args(known):
            raise InputError(
                f"Trajectory {trajectory.id!r} has {value!r} for its {what}; choose of {get_args(known)!r}, and keep "
                "what is your own in `metadata`."
            )
    body = _written(trajectory, f"trajectory {trajectory.id!r}")
    for separator, escaped in _LINE_SEPARATORS:
        body = body.replace(separator, escaped)
    return f'{{"schema":{SCHEMA_VERSION},{body[1:]}'


def definitions_json(tools: Sequence[Mapping[str, Any]]) -> bytes:
    """Return definitions of tools as JSON, the same for the same definitions.

    Raises:
        InputError: they hold a value that JSON has no form for.
    """
    return _written(list(tools), "a set of tools").encode()


def definitions_of(content: bytes) -> tuple[Mapping[str, Any], ...]:
    """Return the definitions that `definitions_json` wrote."""
    return tuple(json.loads(content))


def _written(value: Any, what: str) -> str:
    try:
        try:
            return to_json(value, inf_nan_mode="strings", fallback=_mapping).decode()
        except ValueError:
            return _escaped(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{what} can't be written as JSON: {error}. Metadata, arguments and "
            "messages hold only what JSON can; convert the value before recording it."
        ) from error


def loads(line: str | bytes, restore: Callable[[Any], Any] | None = None) -> Trajectory:
    """Return the trajectory that `dumps` wrote, by this version or an earlier one.

    Args:
        line: what was written.
        restore: applied to the parsed line before it is checked, such as what puts images back.

    Raises:
        InputError: the line is not JSON, or not a trajectory, or would take too much memory.
        SchemaVersionError: a newer Metis wrote it.
    """
    if restore is None and (trajectory := _quickly(_trajectory(), line)) is not None:
        return cast(Trajectory, trajectory)
    record = _migrate(_parse(line))
    if restore is not None:
        record = restore(record)
    try:
        return cast(Trajectory, _trajectory().validate_python(record))
    except ValidationError as error:
        raise InputError(f"record {_shown(record.get('id'))} is not a trajectory: {_summary(error)}.") from error


def loads_outcome(line: str | bytes, restore: Callable[[Any], Any] | None = None) -> Trajectory:
    """Return the trajectory without its turn's messages, model calls and tools: what scoring needs, much faster.

    The conversation before the turn stays, as a gate reads it.

    Raises:
        InputError, SchemaVersionError: as `loads`.
    """
    if restore is None and (outcome := _quickly(_outcome(), line)) is not None:
        return Trajectory(**vars(outcome))
    return replace(loads(line, restore), messages=(), calls=(), tools=())


def identity(line: str | bytes) -> tuple[str, TrajectoryStatus]:
    """Return id and status of a line without building the trajectory: what a resumed run needs.

    Raises:
        InputError, SchemaVersionError: as `loads`.
    """
    head = _quickly(_head(), line) or loads(line)
    return head.id, head.status


def is_json(line: str | bytes) -> bool:
    """True where the line is whole JSON, whatever it holds; a torn line is not."""
    try:
        json.loads(line, parse_int=_integer)
    except (ValueError, RecursionError):
        return False
    return True


def plain(value: Any) -> Any:
    """Return the value with a note in place of whatever in it JSON has no form for, or no reader could hold.

    Recorders call it: a tool's artifact may be any object, and a record of a turn must not fail for it.
    """
    return _Plain().of(value, 0)


@dataclass(frozen=True, kw_only=True)
class _Head:
    id: str
    status: TrajectoryStatus


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """A trajectory without its turn's messages, calls and tools; `TrajectoryStore` tests compare the two."""

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
    history: tuple[Mapping[str, Any], ...] = ()
    conversation: str = ""
    user: str = ""


def _quickly(validator: SchemaValidator, line: str | bytes) -> Any | None:
    """What a line of this version holds; `None` where the careful way finds the reason, or copes (half an emoji)."""
    if len(line) > _LARGE:
        content = line.encode(errors="replace") if isinstance(line, str) else line
        values = content.count(b",") + content.count(b"[") + content.count(b"{")
        if values > _MOST_VALUES:
            raise InputError(f"not a line to read: it holds about {values} values; {_MOST_VALUES} are the most.")
    if not _is_current(line):
        return None
    try:
        return validator.validate_json(line)
    except ValidationError:
        return None


class _Plain:
    """One pass of `plain`: what it has met on its way down, and how much."""

    def __init__(self) -> None:
        self._above: set[int] = set()
        self._left = _MOST_VALUES

    def of(self, value: Any, depth: int) -> Any:
        name = type(value).__name__
        if depth > _PLAIN_DEPTH or self._left < 0 or id(value) in self._above:
            return f"[{name} not recorded: too deep or too large]"
        try:
            if value is None or isinstance(value, str | bool | float):
                return value
            if isinstance(value, int):
                return value if value.bit_length() < 3 * _MOST_DIGITS else hex(value)
            self._above.add(id(value))
            return self._container(value, depth + 1)
        except Exception:  # objects of any kind come here, and raise what they like when they are looked at
            return f"[{name} not recorded: it has no JSON form]"
        finally:
            self._above.discard(id(value))

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, BaseModel):
            value = {**value.__dict__, **(value.__pydantic_extra__ or {})}
        elif is_dataclass(value):
            value = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        if isinstance(value, Mapping):
            self._left -= len(value)
            return {key if isinstance(key, str) else str(key): self.of(item, depth) for key, item in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            self._left -= len(value)
            items = [self.of(item, depth) for item in value]
            return tuple(items) if type(value) is tuple else items
        if isinstance(value, Iterator | AsyncIterator):
            raise TypeError("to look at it is to use it up")
        return self.of(to_jsonable_python(value, fallback=_mapping), depth)


def _adapter(noun: type[Any]) -> SchemaValidator:
    """What checks records; of a list of a million wrong values it names the first and stops, as a note of each would
    take a hundred times the line's own memory.
    """
    return SchemaValidator(_fail_fast(TypeAdapter(noun).core_schema))


def _fail_fast(schema: Any) -> Any:
    if isinstance(schema, dict):
        marked = {key: _fail_fast(item) for key, item in schema.items()}
        return marked | {"fail_fast": True} if schema.get("type") in _FAILING_FAST else marked
    return type(schema)(map(_fail_fast, schema)) if type(schema) in (list, tuple) else schema


@cache
def _outcome() -> SchemaValidator:
    return _adapter(_Outcome)


@cache
def _trajectory() -> SchemaValidator:
    return _adapter(Trajectory)


@cache
def _head() -> SchemaValidator:
    return _adapter(_Head)


def _mapping(value: object) -> object:
    """Return a mapping of any kind as a dict; nothing else that reaches here has a JSON form."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _escaped(value: Any) -> str:
    """Write with escapes only: a lone surrogate (half an emoji, cut by a tokenizer) is no UTF-8."""
    tree = json.loads(json.dumps(value, default=_fields), parse_constant=str)
    _check_depth(tree, _DEEPEST)
    return json.dumps(tree, separators=(",", ":"))


def _fields(value: object) -> object:
    return vars(value) if is_dataclass(value) else to_jsonable_python(value, fallback=_mapping)


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


def _check_depth(value: Any, deepest: int) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(deepest):
        parts = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in parts if isinstance(item, dict | list)]
    if level:
        raise ValueError(f"nested deeper than {deepest} levels")


def _is_current(line: str | bytes) -> bool:
    prefix = f'{{"schema":{SCHEMA_VERSION},'
    return line.startswith(prefix) if isinstance(line, str) else line.startswith(prefix.encode())


def _parse(line: str | bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_int=_integer)
        _check_depth(record, _DEEPEST + 50)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a line of JSON: {error or type(error).__name__}.") from error
    if not isinstance(record, dict):
        raise InputError(f"a trajectory is a JSON object; this line holds a {type(record).__name__}.")
    return record


_LAST_VERSION = 9999
"""A number beyond it is no version of a later Metis, for which reading stops, but a bad line."""


def _migrate(record: dict[str, Any]) -> dict[str, Any]:
    version = record.get("schema")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= _LAST_VERSION:
        raise InputError(f"schema is {version!r:.100}; every trajectory carries its version, an integer from 1.")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"record {_shown(record.get('id'))} has schema {version!r}; this Metis reads up to {SCHEMA_VERSION}. "
            "Upgrade langgraph-metis, or read it with the version that wrote it."
        )
    while version < SCHEMA_VERSION:
        record = MIGRATIONS[version](record)
        version += 1
    return record


def _shown(value: object) -> str:
    """A value from a record for a message: hostile ones may be of any length."""
    return f"{value!r:.100}" if isinstance(value, str) else f"{type(value).__name__}"


def _summary(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where or 'record'}: {first['msg']}{more}"
