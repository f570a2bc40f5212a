"""Reading the YAML file of `metis train policy`, with errors that name the key, what is there and what should be."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from metis_agent.cli.policy_run import PolicyRun
from metis_agent.errors import ConfigurationError, MissingDependencyError

__all__ = ["CONFIGS", "locate", "read_run"]

CONFIGS = Path(str(files("metis_agent.hdpo") / "configs"))
"""The packaged files."""


def read_run(path: str | Path, changes: Sequence[str] = ()) -> PolicyRun:
    """Read and check a configuration.

    Args:
        path: A YAML file, or the name of a packaged one such as "laptop".
        changes: KEY=VALUE each, such as "training.steps=5"; the value is YAML.

    Raises:
        ConfigurationError: it can't be read, or a key is wrong: which, what is there, and what should be.
    """
    place = locate(str(path))
    found = _parse(place.read_text(encoding="utf-8"), str(place))
    if not isinstance(found, dict):
        raise ConfigurationError(f"{str(place)!r} holds {found!r}; it must be a mapping of keys, such as 'model:'.")
    for change in changes:
        _change(found, change)
    try:
        return PolicyRun.model_validate(found)
    except ValidationError as error:
        raise ConfigurationError(f"{str(place)!r}: " + "; ".join(_explained(each) for each in error.errors())) from None


def locate(path: str) -> Path:
    """The file itself, or the packaged one of this name.

    Raises:
        ConfigurationError: there is neither.
    """
    place, packaged = Path(path), CONFIGS / f"{path}.yaml"
    if place.is_file():
        return place
    if packaged.is_file():
        return packaged
    names = sorted(found.stem for found in CONFIGS.glob("*.yaml"))
    raise ConfigurationError(f"there is no file {path!r}; name a YAML file, or a packaged one of {names!r}.")


def _parse(text: str, place: str) -> Any:
    try:
        import yaml
    except ImportError as missing:
        raise MissingDependencyError(
            "a configuration needs 'yaml'; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{place!r} is no YAML: {' '.join(str(error).split())}") from None


def _change(found: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not (key and equals):
        raise ConfigurationError(f"--set {change!r} changes nothing: write KEY=VALUE, such as training.steps=5.")
    *path, last = key.split(".")
    part: Any = found
    for name in path:
        part = part.setdefault(name, {}) if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise ConfigurationError(f"--set {change!r}: {key!r} leads into something that is no mapping.")
    part[last] = _parse(value, f"--set {change}")


def _explained(error: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "missing":
        return f"{key} is missing; every run needs it"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys(PolicyRun), n=1)
        return f"{key} is no key of a run" + (f"; did you mean {near[0]!r}?" if near else "; take it out")
    return f"{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(name)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names += _keys(kind)
    return names
