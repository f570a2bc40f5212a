"""A trained gate on disk: a folder with `gate.json` and its tensors as safetensors. Never pickle.

Written by `metis_agent.hdpo.export`, read here in plain Python, so that serving a gate needs neither torch nor
numpy. `gate.json` holds the hash of every other file: a folder that was changed by hand does not load. One that was
published comes from a Hugging Face hub: only `gate.json` and the files that it names, at one commit.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

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
    "is_number",
    "load_artefact",
]


FORMAT = 2
"""Version of the format of `gate.json`; a newer one is refused. From 2 on it says how text is read."""
GATE_FILE = "gate.json"
TENSOR_FILE = "gate.safetensors"

_LONGEST_DESCRIPTION = 16_000_000
"""Bytes of `gate.json`, and of the header of the tensors."""
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

    @property
    def heads(self) -> int:
        """Logits that the gate gives: direct, the tools, and the cost to come where it tells it."""
        return 1 + len(self.tools) + ("most_to_come" in self.description["decision"])


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
        # A pipe would be waited for, a device read without end.
        if path.exists() and not (path.is_file() and path.stat().st_size <= _LONGEST_DESCRIPTION):
            raise CheckpointError(f"{str(path)!r} is no file of at most {_LONGEST_DESCRIPTION} bytes: no gate of ours.")
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{str(folder)!r} is no gate: its {GATE_FILE} can't be read ({error}). Give the folder that "
            "`metis train gate --out` wrote."
        ) from error
    except (ValueError, RecursionError) as error:
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
    _check(description, path)
    return dict(description)


def _check(description: Mapping[str, Any], path: Path) -> None:
    """Whoever made the folder can make its hashes too, so each value that is used is looked at."""

    def rule(holds: bool, key: str, what: str) -> None:
        if not holds:
            shown = repr(description[key])[:200]
            raise CheckpointError(f"{str(path)!r} has {key!r} {shown}; it must be {what}. Export the gate again.")

    for key in ("kind", "version"):
        rule(isinstance(description[key], str), key, "text")
    files, tools, threshold = description["files"], description["tools"], description["threshold"]
    rule(isinstance(files, dict) and all(isinstance(it, str) for it in files.values()), "files", "a hash for each file")
    named = isinstance(tools, list) and [tool.get("name") for tool in tools if isinstance(tool, dict)]
    text = named and len(named) == len(tools) and all(isinstance(name, str) and name for name in named)
    rule(bool(text) and len(set(named or ())) == len(tools), "tools", "a list of at least one tool, each with its name")
    value: Any = threshold.get("value") if isinstance(threshold, dict) else None
    rule(is_number(value) and 0 <= value <= 1, "threshold", "an object whose value is a number in [0, 1]")
    rule(isinstance(description["policy"], dict), "policy", "an object")
    found, heads = description["decision"], 1 + len(tools)
    decision = found if isinstance(found, dict) else {}
    lists = [decision.get(key) for key in ("head_temperature", "saving", "mean_accuracy")]
    numbers = [decision.get(key) for key in ("trust", "beta", "temperature")]
    by_step, most = decision.get("step_saving", []), decision.get("most_to_come", 1.0)
    rule(
        bool(decision)
        and all(isinstance(it, list) and len(it) == heads and all(map(is_number, it)) for it in lists)
        and all(map(is_number, numbers))
        and isinstance(by_step, list)
        and all(map(is_number, [*by_step, most]))
        and min(*decision["head_temperature"], decision["temperature"], most) > 0,
        "decision",
        f"an object of finite numbers, those by head {heads} of them, temperatures and the cost to come above 0",
    )


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number that a float can hold, and no boolean."""
    # By comparison: `math.isfinite` raises on an int above all floats.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def description_hash(description: Mapping[str, Any]) -> str:
    """SHA-256 of `gate.json` without its own hash."""
    rest = {key: value for key, value in description.items() if key != "hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The safetensors format: 8 bytes of header length, a JSON header, the numbers, little-endian."""
    raw = memoryview(path.read_bytes())
    try:
        (length,) = struct.unpack_from("<Q", raw)
        if length > min(len(raw), _LONGEST_DESCRIPTION):
            raise ValueError(f"a header of {length} bytes")
        header, body = json.loads(bytes(raw[8 : 8 + length])), raw[8 + length :]
        tensors = {name: _tensor(entry, body) for name, entry in header.items() if name != "__metadata__"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} can't be read as safetensors ({error!r}); export it again.") from error
    return tensors


def _tensor(entry: Mapping[str, Any], body: memoryview) -> Tensor:
    (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
    values = array(_CODES[entry["dtype"]])
    if not (0 <= start <= end <= len(body) and all(isinstance(size, int) and size >= 0 for size in shape)):
        raise ValueError(f"a tensor of shape {shape!r} at {start!r} to {end!r} of {len(body)} bytes")
    values.frombytes(body[start:end])
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} numbers for the shape {shape!r}")
    if sys.byteorder == "big":
        values.byteswap()
    return Tensor(shape=shape, values=values)


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
