"""The public names with their signatures, as text: `python -m tests.public_api` writes `public_api.txt` anew.

What changes there changes for users: a line that goes, or changes, breaks somebody's code and belongs into the
changelog. Only what is defined in this package is listed, nothing that a base class of a dependency brings.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

__all__ = ["FROZEN", "MODULES", "described"]

FROZEN = Path(__file__).with_name("public_api.txt")
MODULES = (
    "metis_agent", "metis_agent.types", "metis_agent.errors", "metis_agent.gates", "metis_agent.recording",
    "metis_agent.tools", "metis_agent.tools.search", "metis_agent.tools.sandboxes",
    "metis_agent.models", "metis_agent.rollouts", "metis_agent.judging", "metis_agent.hdpo", "metis_agent.evaluation",
    "metis_agent.traces", "metis_agent.audit", "metis_agent.publish",
)  # fmt: skip
"""Those whose `__all__` is promised."""

_PLAIN = (str, int, float, bool, tuple, type(None), Path)


def described() -> str:
    """Every public name, each once, where it is first exported."""
    lines: list[str] = []
    seen: set[int] = set()
    for name in MODULES:
        module = importlib.import_module(name)
        lines.append(f"[{name}]")
        for exported in sorted(module.__all__):
            thing = getattr(module, exported)
            if id(thing) in seen and (inspect.isclass(thing) or inspect.isfunction(thing)):
                lines.append(f"{exported}: see above")
            else:
                lines += _described(exported, thing)
            seen.add(id(thing))
        lines.append("")
    return "\n".join(lines)


def _described(name: str, thing: Any) -> list[str]:
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        return [f"class {name}({bases})", *(f"    {line}" for line in _members(thing))]
    if inspect.isfunction(thing):
        return [f"{_function(name, thing)}"]
    return [f"{name} = {thing!r}" if isinstance(thing, str | int) and name != "__version__" else name]


def _members(cls: type) -> list[str]:
    ours = [base for base in cls.__mro__ if base.__module__.startswith("metis_agent")]
    found: dict[str, str] = {}
    for base in reversed(ours):
        fields = {field.name: field for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else {}
        for name, annotation in inspect.get_annotations(base).items():
            if not name.startswith("_"):
                found[name] = f"{name}: {_text(annotation)}{_default(base, name, fields)}"
        for name, member in vars(base).items():
            if name.startswith("_") and name not in ("__init__", "__call__", "__enter__", "__aenter__"):
                continue
            if name == "__init__" and (dataclasses.is_dataclass(base) or "self" not in str(inspect.signature(member))):
                continue  # the fields say it
            if isinstance(member, property):
                found[name] = f"{name} -> {_text(inspect.signature(member.fget).return_annotation)}"  # type: ignore[arg-type]
            elif isinstance(member, staticmethod | classmethod):
                found[name] = f"{type(member).__name__} {_function(name, member.__func__)}"
            elif inspect.isfunction(member):
                found[name] = _function(name, member)
    return [found[name] for name in sorted(found)]


def _function(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parts, star = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        elif parameter.kind is parameter.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_text(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_value(parameter.default)}"
        parts.append(f"{mark}{parameter.name}{annotation}{default}")
    returned = "" if signature.return_annotation is signature.empty else f" -> {_text(signature.return_annotation)}"
    kind = "async def" if inspect.iscoroutinefunction(function) else "def"
    return f"{kind} {name}({', '.join(parts)}){returned}"


def _default(base: type, name: str, fields: dict[str, Any]) -> str:
    if name in fields:
        field = fields[name]
        if field.default is not dataclasses.MISSING:
            return f" = {_value(field.default)}"
        return " = ..." if field.default_factory is not dataclasses.MISSING else ""
    model = getattr(base, "model_fields", {}).get(name)
    if model is not None:
        return "" if model.is_required() else " = ..." if model.default_factory else f" = {_value(model.default)}"
    return f" = {_value(vars(base)[name])}" if name in vars(base) else ""


def _value(value: Any) -> str:
    """Plain values as they are; others by their type, as their text may hold addresses."""
    if isinstance(value, _PLAIN) and not (isinstance(value, tuple) and not all(isinstance(v, _PLAIN) for v in value)):
        return repr(value)
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


if __name__ == "__main__":
    FROZEN.write_text(described())
    print(f"{FROZEN.name}: {len(described().splitlines())} lines")
