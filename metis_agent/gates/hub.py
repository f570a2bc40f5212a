"""A published gate, fetched from a Hugging Face hub: only `gate.json` and the files that it names, at one commit.

Where it stands: `metis push` -> **hub** -> `PolicyGate.from_pretrained`, which checks the hashes and loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from metis_agent.errors import CheckpointError, ConfigurationError, MissingDependencyError
from metis_agent.gates.artefact import GATE_FILE

__all__ = ["fetch_gate"]


def fetch_gate(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a gate: `name` itself where it is a folder, else a copy from the hub in the usual cache.

    Args:
        name: A folder, or `owner/name` on the hub.
        revision: A commit, tag or branch; name a commit, and nobody can change what you run.
        token: By default that of `hf auth login`, or the variable HF_TOKEN.

    Raises:
        CheckpointError: there is no such gate, or it can't be fetched.
        ConfigurationError: `name` is neither a folder nor a name, or a folder has a revision.
        MissingDependencyError: huggingface_hub is not installed.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ConfigurationError(f"revision={revision!r}, and {str(name)!r} is a folder here: leave it out.")
        return Path(name)
    hub = _hub()
    try:
        described = Path(hub.hf_hub_download(str(name), GATE_FILE, revision=revision, token=token))
        # The commit that the first file came from, or a push in between could mix two gates.
        commit = described.parent.name
        for file in _files(described, str(name)):
            hub.hf_hub_download(str(name), file, revision=commit, token=token)
    except hub.errors.HFValidationError as error:
        raise ConfigurationError(
            f"{str(name)!r} is neither a folder here nor a name on the hub, which is written owner/name: {error}"
        ) from error
    except (hub.errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"The gate {str(name)!r} can't be fetched (revision {revision!r}): {type(error).__name__}: {error} Check "
            "the name and the connection; a private one needs `hf auth login`."
        ) from error
    return described.parent


def _files(described: Path, name: str) -> list[str]:
    try:
        files: Any = json.loads(described.read_text(encoding="utf-8"))["files"]
        found = sorted(files)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The {GATE_FILE} of {name!r} is none of ours ({error!r}).") from error
    if strange := [file for file in found if not isinstance(file, str) or Path(file).name != file]:
        raise CheckpointError(f"The {GATE_FILE} of {name!r} names {strange[:3]!r}, which are no plain file names.")
    return found


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as missing:
        raise MissingDependencyError(
            "A gate from a hub needs huggingface_hub; install it with: pip install huggingface_hub. Or give a folder."
        ) from missing
    return huggingface_hub
