"""The small values of traces, as every exporter writes them otherwise: JSON in strings, times, counts of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from pydantic_core import from_json

from metis_agent.errors import InputError
from metis_agent.types import amount_of

__all__ = ["PAGES", "as_json", "elements_of", "ids_above", "parse_json", "text_of", "time_of", "usage_of"]

PAGES = ("data", "runs", "traces", "observations", "spans", "scores", "items")
"""Keys under which documents, and the pages of APIs, hold their records."""
_OF_ONE = {"id", "trace_id", "traceId", "run_type", "messages", "role", "type"}
"""Keys of records that are no page, whatever they hold besides."""
_DEEPEST = 256
_ALIASES = {
    "input_tokens": ("input_tokens", "prompt_tokens", "prompt", "input", "promptTokens", "inputTokens"),
    "output_tokens": ("output_tokens", "completion_tokens", "completion", "output", "completionTokens", "outputTokens"),
    "total_tokens": ("total_tokens", "total", "totalTokens"),
}
_DETAILS = {
    "input": ("input_token_details", "prompt_tokens_details", "input_tokens_details", "prompt_details"),
    "output": ("output_token_details", "completion_tokens_details", "output_tokens_details", "completion_details"),
}
_FLAT = {
    "cache_read_input_tokens": "input_cache_read",
    "cache_creation_input_tokens": "input_cache_creation",
    "input_cached_tokens": "input_cache_read",
    "output_reasoning_tokens": "output_reasoning",
}
_WITHIN = {"cached_tokens": "input_cache_read", "reasoning_tokens": "output_reasoning"}  # fmt: skip


def parse_json(raw: bytes) -> Any:
    """Return what a text of JSON holds.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return from_json(raw)
    except ValueError:
        try:
            return json.loads(raw.decode("utf-8", "surrogatepass"))  # lone surrogates, which the faster one refuses
        except UnicodeDecodeError as error:
            raise InputError("not in UTF-8") from error
        except (ValueError, RecursionError) as error:
            why = str(error).partition(": line")[0] or type(error).__name__
            raise InputError(f"no JSON ({why.lower()})") from error


def elements_of(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the records of an API's page that stands on one line; any other record is one itself."""
    if not _OF_ONE & set(record):
        for key in PAGES:
            page = record.get(key)
            if isinstance(page, list) and page and all(isinstance(item, Mapping) for item in page):
                yield from page
                return
    yield record


def as_json(value: Any) -> Any:
    """Return what a string of JSON holds; any other value, and any other string, as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(value.encode("utf-8", "surrogatepass"))
        except InputError:
            return value
    return value


def ids_above(id_: str, parent_of: Callable[[str], str]) -> tuple[str, ...]:
    """Return the ids of the spans around one, outermost first: the nearest 256, each once if they go in a circle."""
    found: dict[str, None] = {}
    parent = parent_of(id_)
    while parent and parent != id_ and parent not in found and len(found) < _DEEPEST:
        found[parent] = None
        parent = parent_of(parent)
    return tuple(reversed(found))


def text_of(value: Any) -> str:
    """Return a value as a model reads it: strings as they are, anything else as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def time_of(value: Any) -> float | None:
    """Return Unix seconds of a time in ISO 8601 (UTC where it names no zone), or in s, ms, us or ns since 1970."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, str):
        digits = value.strip()
        if not digits.replace(".", "", 1).isdigit():
            try:
                return time_of(datetime.fromisoformat(digits))
            except ValueError:
                return None
        value = float(digits)
    if not (time := amount_of(value)):
        return None
    # A time of this century in a finer unit is beyond any in a coarser one.
    return next((time / unit for unit in (1e9, 1e6, 1e3) if time > 1e8 * unit), time)


def usage_of(value: Any) -> dict[str, int]:
    """Return token counts as LangChain names them; `input_tokens` includes what was read from a cache.

    Anthropic and Langfuse count cached tokens beside the input, OpenAI and LangChain within it; a total tells which.
    """
    value = as_json(value)
    if not isinstance(value, Mapping):
        return {}
    usage: dict[str, int] = {}
    for name, aliases in _ALIASES.items():
        for alias in aliases:
            if amount_of(value.get(alias)) is not None:
                usage[name] = int(value[alias])
                break
    beside = {"input": 0, "output": 0}
    for side, keys in _DETAILS.items():
        for key in keys:
            for name, count in (value.get(key) or {}).items() if isinstance(value.get(key), Mapping) else ():
                if amount_of(count):
                    usage[_WITHIN.get(name, f"{side}_{name}")] = int(count)
    for name, count in value.items():
        flat = _FLAT.get(name) or (name if name.startswith(("input_cache", "output_reasoning")) else None)
        if flat and amount_of(count) and flat not in usage:
            usage[flat] = int(count)
            beside[flat.partition("_")[0]] += int(count)
    within = usage.get("total_tokens") == usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    for side, count in beside.items():
        if f"{side}_tokens" in usage and not within:
            usage[f"{side}_tokens"] += count
    if "input_tokens" in usage or "output_tokens" in usage:
        usage["total_tokens"] = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
    return usage
