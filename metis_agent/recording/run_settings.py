"""`run.json`: the settings that a run began with, which the same run goes on with after it was stopped.

Beside `formats`. The trainings keep it in their folder (`cli.run_folder`), curation at any fsspec URL
(`hdpo.curation.pipeline`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from metis_agent import formats
from metis_agent.errors import ConfigurationError

__all__ = ["RUN_FILE", "check_settings", "settings_text"]

RUN_FILE = "run.json"

_SHOWN = 4
"""Settings that a message names at most."""


def settings_text(settings: Mapping[str, Any]) -> str:
    """The file's content, for settings that have a JSON form."""
    return json.dumps(formats.with_format(settings, formats.RUN), indent=2) + "\n"


def check_settings(text: str | bytes, settings: Mapping[str, Any], folder: str, *, option: str) -> None:
    """Refuse to go on with a run that began with other settings.

    Args:
        text: the file's content.
        settings: those of now, as JSON has them.
        folder: where the file is.
        option: by which another folder is named.

    Raises:
        ConfigurationError: some are other ones.
        SchemaVersionError: a newer Metis began the run.
    """
    earlier = json.loads(text)
    formats.check_format(earlier, formats.RUN, f"{RUN_FILE} in {folder!r}")
    before, after = _flat(formats.without_format(earlier)), _flat(settings)
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:_SHOWN])
        raise ConfigurationError(
            f"{folder!r} holds a run with other settings: {shown}. Use the same settings to go on with it, --fresh to "
            f"start again, or another {option}."
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            # An empty mapping counts too: a stage without settings is still a stage.
            flat |= _flat(value, f"{prefix}{key}.") or {f"{prefix}{key}": {}}
        else:
            flat[f"{prefix}{key}"] = value
    return flat
