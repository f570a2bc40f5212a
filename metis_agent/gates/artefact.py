"""A trained gate on disk: a folder with `gate.json` and its tensors as safetensors. Never pickle.

Written by `metis_agent.hdpo.export`, read here in plain Python, so that serving a gate needs neither torch nor
numpy. `gate.json` holds the hash of every other file: a folder that was changed by hand does not load. One that was
published comes from a Hugging Face hub: only `gate.json` and the files that it names, at one commit.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_agent.errors import CheckpointError, ConfigurationError, MissingDependencyError, SchemaVersionError

__all__ = [
    "FORMAT",
    "GATE_FILE",
    "TENSOR_FILE",
    "Artefact",
    "Tensor",
    "description_hash",
    "fetch_gate",
    "file_hash",
    "load_artefact",
]


FORMAT = 1
"""Version of the format of `gate.json`; a newer one is refused."""
GATE_FILE = "gate.json"
TENSOR_FILE = "gate.safetensors"

_CODES = {"F32": "f", "F64": "d", "I32": "i", "I64": "q", "U64": "Q"}
_NEEDED = ("kind", "version", "tools", "threshold", "files", "policy", "decision")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Numbers in row-major order."""

    shape: tuple[int, ...]
    values: array[Any]

    def row(self, index: int) -> array[Any]:
        """One row of a matrix."""
        width = self.shape[1]
        return self.values[index * width : (index + 1) * width]


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What the folder holds, its hashes checked."""

    folder: Path
    description: Mapping[str, Any]
    """`gate.json`."""
    tensors: Mapping[str, Tensor]

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the tools that the gate was trained for, in the order of its heads."""
        return tuple(tool["name"] for tool in self.description["tools"])


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_artefact(folder: str | Path) -> Artefact:
    """Read and check an artefact folder.

    Raises:
        CheckpointError: a file is missing, not one of ours, or not what was written.
        SchemaVersionError: a newer Metis wrote it.
    """
    folder = Path(folder)
    description = _description(folder)
    for name, written in description["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                f"{str(folder)!r} has no file {name!r}, which its {GATE_FILE} names; export it again."
            )
        if (found := file_hash(path)) != written:
            raise CheckpointError(
                f"{str(path)!r} has SHA-256 {found!r}; {GATE_FILE} says {written!r}. It was changed or cut short "
                "after it was exported: fetch the artefact again, or train it again."
            )
    _refuse_strangers(folder, description["files"])
    if TENSOR_FILE not in description["files"]:
        raise CheckpointError(f"{str(folder)!r} lists no {TENSOR_FILE!r} among its files; export it again.")
    return Artefact(folder=folder, description=description, tensors=_read_tensors(folder / TENSOR_FILE))


def _refuse_strangers(folder: Path, known: Mapping[str, str]) -> None:
    """Where transformers loads the folder: an adapter or a template that was put beside the weights would count."""
    if "config.json" not in known:
        return
    for path in sorted(folder.iterdir()):
        if (
            path.name not in known
            and path.name != GATE_FILE
            and path.suffix not in (".md", ".draft")
            and path.name[0] != "."
        ):
            raise CheckpointError(
                f"{str(folder)!r} holds {path.name!r}, which its {GATE_FILE} does not name: it may change what the "
                "model says. Remove it, or fetch the artefact again."
            )


def _description(folder: Path) -> dict[str, Any]:
    path = folder / GATE_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{str(folder)!r} is no gate: its {GATE_FILE} can't be read ({error}). Give the folder that "
            "`metis train gate --out` wrote."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is no JSON ({error}); export the gate again.") from error
    format_ = description.get("format") if isinstance(description, dict) else None
    if not isinstance(format_, int) or isinstance(format_, bool) or format_ < 1:
        raise CheckpointError(
            f"{str(path)!r} has the format {format_!r}, no version (an integer from 1): it is no gate of ours."
        )
    if format_ > FORMAT:
        raise SchemaVersionError(
            f"{str(path)!r} has format {format_!r}; this Metis reads up to {FORMAT}. Upgrade langgraph-metis."
        )
    if missing := [key for key in _NEEDED if key not in description]:
        raise CheckpointError(f"{str(path)!r} lacks {missing!r}; export the gate again.")
    # The hashes guard the tensors; this guards what says how to read them, the threshold above all.
    if description.get("hash") != description_hash(description):
        raise CheckpointError(
            f"{str(path)!r} was changed after it was exported: its contents don't give its hash "
            f"{description.get('hash')!r}. Set another threshold with PolicyGate(threshold=...) or `metis calibrate`."
        )
    return dict(description)


def description_hash(description: Mapping[str, Any]) -> str:
    """SHA-256 of `gate.json` without its own hash."""
    rest = {key: value for key, value in description.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The safetensors format: 8 bytes of header length, a JSON header, the numbers, little-endian."""
    raw = path.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", raw)
        header = json.loads(raw[8 : 8 + length])
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            values = array(_CODES[entry["dtype"]])
            values.frombytes(raw[8 + length + start : 8 + length + end])
            if sys.byteorder == "big":
                values.byteswap()
            tensors[name] = Tensor(shape=tuple(entry["shape"]), values=values)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} can't be read as safetensors ({error!r}); export it again.") from error
    return tensors


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
