"""Every exception that Metis raises.

    MetisError
    ├── ConfigurationError (ValueError)        a wrong argument, found before any work starts
    │   ├── UnknownToolError (KeyError)        a tool name that the agent does not have
    │   └── MissingDependencyError (ImportError)  an extra is not installed
    ├── InputError (ValueError)                a question or a record that can't be used
    ├── GateError (RuntimeError)               a gate could not decide
    ├── ToolError (RuntimeError)               a tool failed in a way that the model may read
    ├── InfrastructureError (RuntimeError)     not the model's fault: the rollout is excluded and counted
    │   ├── SandboxUnavailableError            no contained way to run code on this machine
    │   ├── SandboxGoneError                   the sandbox died under a call
    │   └── JudgeUnavailableError              a verifier or judge could not answer
    └── StorageError (OSError)                 records can't be read or written
        ├── CheckpointError                    a model folder is missing, truncated or foreign
        └── SchemaVersionError                 a record or artefact of a newer format

Each also inherits the standard exception in brackets, so callers need not import this module.
A message says what was wrong, the value, the rule, and the remedy. Then, outages that a model reads of and goes on
from: rollouts hear of them here, and leave the answer out. Last, how a package imports its public names when
they are asked for, so that what is not installed is missed by name, with the remedy.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "GateError",
    "InfrastructureError",
    "InputError",
    "JudgeUnavailableError",
    "MetisError",
    "MissingDependencyError",
    "SandboxGoneError",
    "SandboxUnavailableError",
    "SchemaVersionError",
    "StorageError",
    "ToolError",
    "UnknownToolError",
]


class MetisError(Exception):
    """The root of the tree; never raised itself."""


class ConfigurationError(MetisError, ValueError):
    """An argument is wrong; raised before any work starts."""


class UnknownToolError(ConfigurationError, KeyError):
    """A tool is named that the agent does not have."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(ConfigurationError, ImportError):
    """An optional part of Metis is used whose extra is not installed."""


class InputError(MetisError, ValueError):
    """A question, message or record can't be used as it is."""


class GateError(MetisError, RuntimeError):
    """A gate could not decide."""


class ToolError(MetisError, RuntimeError):
    """A tool failed in a way that the model may read and act on."""


class InfrastructureError(MetisError, RuntimeError):
    """Something around the model failed; the rollout is excluded and counted, never scored."""


class SandboxUnavailableError(InfrastructureError):
    """No contained way to run code works on this machine."""


class SandboxGoneError(InfrastructureError):
    """The sandbox died under a call; the next session starts a new one."""


class JudgeUnavailableError(InfrastructureError):
    """A verifier or a judge could not answer; the answer is neither right nor wrong."""


class StorageError(MetisError, OSError):
    """Records can't be read or written."""


class CheckpointError(StorageError):
    """A model folder is missing, truncated or not one of ours."""


class SchemaVersionError(StorageError):
    """A record or an artefact was written by a newer Metis."""


_outages: ContextVar[list[str] | None] = ContextVar("metis_outages", default=None)
_DOWN = re.compile(r"Connect|Timeout|RateLimit|Unavailable|TransportError")


@contextmanager
def noted_outages() -> Iterator[list[str]]:
    """Of the tools within the block: what was said of services that did not answer.

    A model reads of an outage and goes on, which is right for a user; an answer that it led to says nothing of the
    tool, so rollouts leave it out.
    """
    noted: list[str] = []
    token = _outages.set(noted)
    try:
        yield noted
    finally:
        _outages.reset(token)


def note_outage(error: Exception) -> None:
    """A tool could not do its work for want of a service."""
    noted = _outages.get()
    if noted is not None:
        noted.append(f"{type(error).__name__}: {error}")


def is_outage(error: Exception) -> bool:
    """Whether an error that a tool raised is the network's or its service's, by its class or its HTTP status."""
    status = getattr(getattr(error, "response", None) or error, "status_code", None)
    refused = isinstance(status, int) and (status == 429 or status >= 500)
    return refused or any(_DOWN.search(kind.__name__) for kind in type(error).__mro__)


def lazy_names(package: str, modules: Mapping[str, str], extra: str) -> Callable[[str], Any]:
    """A package's `__getattr__`: each public name is imported when it is asked for.

    Args:
        package: its `__name__`.
        modules: public name -> the module of the package that has it.
        extra: brings what these modules need.
    """

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        except ImportError as missing:
            # What says itself how it is installed, or a fault of our own.
            if isinstance(missing, MissingDependencyError) or (missing.name or "metis_agent").startswith("metis_agent"):
                raise
            raise MissingDependencyError(
                f"{name} needs {missing.name!r}; install it with: pip install 'langgraph-metis[{extra}]'"
            ) from missing

    return find
