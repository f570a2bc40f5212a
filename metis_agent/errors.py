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
A message says what was wrong, the value, the rule, and the remedy. Last, how a package imports its public names when
they are asked for, so that what is not installed is missed by name, with the remedy.
"""

from collections.abc import Callable, Mapping
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
