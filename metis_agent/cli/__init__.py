"""The `metis` command: what its help lists, the one line that an error is, exit codes.

Each command is a file, which is imported when the command is called: what the list says of it stands here too.
"""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import metis_agent
from metis_agent.errors import MetisError, MissingDependencyError, StorageError

__all__ = ["app", "command", "main"]

_INTERRUPTED = 130
_TRY, _LEARN, _LOOK = "Try it", "Record and learn", "Measure, watch, publish"
_COMMANDS = {
    "demo": (
        "demo:demo_command", _TRY,
        "Train the tiny agent by HDPO on its own trajectories, and show before and after.",
    ),
    "ask": (
        "ask:ask_command", _TRY,
        "Ask an agent, and see each decision, call and result on the way to its answer.",
    ),
    "doctor": (
        "doctor:doctor", _TRY,
        "Say what works here, what does not, and what to do. Exit code 0 means that the core works.",
    ),
    "import": (
        "import_traces:import_command", _LEARN,
        "Read traces of any agent into a store of trajectories: what `metis audit` and `metis train gate` work on.",
    ),
    "rollout": (
        "rollout:rollout_command", _LEARN,
        "Ask a model each question without a tool, with each tool, and as it likes, and record what comes of it.",
    ),
    "curate": (
        "curate:curate_app", _LEARN,
        "Choose what is worth learning from. Nothing is lost: what is dropped is kept, with the reason, in a "
        "quarantine.",
    ),
    "train": (
        "train:train_app", _LEARN,
        "Train from records.",
    ),
    "calibrate": (
        "calibrate:calibrate_command", _LEARN,
        "Choose the gate's threshold so that a promise holds for new questions like these, and write it to the gate.",
    ),
    "evaluate": (
        "evaluate:evaluate_app", _LOOK,
        "Measure what was trained.",
    ),
    "audit": (
        "audit:audit_command", _LOOK,
        "Say what an agent's tool calls changed, from recorded runs alone, and what the others cost.",
    ),
    "report": (
        "publish:report_command", _LOOK,
        "Show what was saved and what it cost in accuracy: one page to open in a browser, or to send to somebody.",
    ),
    "drift": (
        "calibrate:drift_command", _LOOK,
        "Say whether today's questions are like those that the gate was calibrated on.",
    ),
    "push": (
        "publish:push_command", _LOOK,
        "Publish a gate or a model with a card: what was measured, on which data, what is promised, how to load it.",
    ),
}  # fmt: skip
"""Name, in the order in which they are needed: module and function or group, panel, what it does."""


def command(name: str) -> Any:
    """The command of this name, or the group of commands, as a click command."""
    module, _, attribute = _COMMANDS[name][0].partition(":")
    found = getattr(import_module(f"metis_agent.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        made: Any = typer.main.get_group(found)
    else:
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        made = typer.main.get_command(alone)
    made.name = name
    return made


class _Listed(TyperGroup):
    """Commands as they are listed; the one that is called takes its entry's place."""

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        name, entry, rest = super().resolve_command(ctx, args)
        return name, entry and command(entry.name or ""), rest


app = typer.Typer(
    name="metis",
    help="Metis knows when not to call a tool.\n\nBegin with `metis demo`: it trains a tiny agent here, offline, "
    "and shows what it was like before and after; `metis ask` lets you try it. Then your own agent: `metis rollout` "
    "records what each branch of your questions brings, `metis train gate` learns from it, `metis calibrate` sets the "
    "threshold for a promise, `metis evaluate` and `metis report` show what was saved.",
    cls=_Listed,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for _name, (_, _panel, _help) in _COMMANDS.items():
    app.command(_name, help=_help, rich_help_panel=_panel)(lambda: None)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"langgraph-metis {metis_agent.__version__}")
        raise typer.Exit


@app.callback()
def _metis(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; a known error is one line and exit code 1, Ctrl-C is 130."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print("\nStopped. Run the same command again to go on from here.")
        raise
    except Exception as error:
        known = _in_one_line(error)
        if known is None:
            raise
        from metis_agent.cli.output import Screen  # after the fact: help and version need no more than they show

        # Not wrapped: the remedy is often a command to copy.
        said = f"[bold red]{type(known).__name__}[/]: {escape(str(known))}"
        Screen(stderr=True).print(said, highlight=False, soft_wrap=True)
        sys.exit(1)


_EXTRAS = {
    "e2b": ("e2b", "e2b_code_interpreter"), "search": ("ddgs",), "tantivy": ("tantivy",), "images": ("PIL", "httpx"),
    "langchain": ("langchain",), "math": ("math_verify",), "vllm": ("langchain_openai",), "audit": ("genai_prices",),
    "traces": ("psycopg", "langgraph.checkpoint"),
    "train": ("accelerate", "datasets", "matplotlib", "numpy", "peft", "pyarrow", "safetensors", "scipy", "sklearn",
              "torch", "transformers", "trl", "yaml"),
}  # fmt: skip
"""Extra -> what comes with it alone."""
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
                errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # fmt: skip
_FULL = ("No space left on device", "File too large", "Disk quota exceeded", "No usable temporary directory")


def _in_one_line(error: Exception) -> MetisError | None:
    """What the line says, where this is an error of the surroundings and not of the program."""
    if isinstance(error, MetisError):
        return error
    if isinstance(error, ImportError):
        name = error.name or ""
        extra = next((extra for extra, names in _EXTRAS.items() if name.startswith(names)), None)
        if extra is None:
            return None
        return MissingDependencyError(
            f"this command needs {name!r}; install it with: pip install 'langgraph-metis[{extra}]'"
        )
    # Libraries that write files themselves, such as safetensors, have errors of their own.
    if (isinstance(error, OSError) and error.errno in _OF_THE_DISK) or any(said in str(error) for said in _FULL):
        said = " ".join(str(error).split())
        return StorageError(
            f"{said}. Make room there, or name another place; what was finished is kept, and the same command goes on."
        )
    return None
