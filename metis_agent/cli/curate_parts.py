"""The parts that `metis curate` builds from its options: tools, the base model, judges, the table at the end."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from metis_agent.cli.agent_options import load_attribute, tools_in
from metis_agent.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel
    from langchain_core.tools import BaseTool

    from metis_agent.agent import MetisAgent
    from metis_agent.curation.pipeline import CurationReport
    from metis_agent.gates.base import Gate

__all__ = ["agent_builder", "open_base", "open_model", "open_tools", "show_report", "work_folder"]


def open_tools(named: Sequence[str], *, python: bool, corpus: Path | None, sessions: int) -> tuple[list[BaseTool], str]:
    """The tools that calls are re-executed with, and a text that changes when what they say may change.

    Args:
        named: MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE each, a tool, a list of tools, or a function that returns either.
        python: whether the sandboxed Python tool is one of them.
        corpus: documents that `text_search` searches.
        sessions: sandbox sessions open at once.

    Raises:
        ConfigurationError: a name leads to no tool, or two tools have one name.
        SandboxUnavailableError: nothing contains code on this machine.
    """
    tools = [tool for name in named for tool in _named_tools(name)]
    given = {tool.name for tool in tools}
    version = list(named)
    if corpus is not None:
        from metis_agent.tools.search import CorpusSearch
        from metis_agent.tools.search.documents import digest_path
        from metis_agent.tools.text_search import TextSearchTool

        tools.append(TextSearchTool(backend=CorpusSearch.from_path(corpus)))
        version.append(f"corpus {digest_path(corpus)}")
    if python and "python" not in given:
        from metis_agent.tools.python import PythonTool

        sandboxed = PythonTool(max_sessions=sessions, idle_seconds=60.0)
        version.append(f"python in {sandboxed.check()}")
        tools.append(sandboxed)
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise ConfigurationError(f"tools {names!r}: each needs a name of its own; leave out --corpus or a --tools.")
    return tools, "; ".join(version)


def _named_tools(name: str) -> list[BaseTool]:
    from langchain_core.tools import BaseTool

    found: Any = load_attribute(name)
    if not isinstance(found, BaseTool | type) and callable(found) and not _needs_arguments(found):
        made = found()
        parts = made if isinstance(made, list | tuple) else [made]
        # A function that makes no tools is one.
        found = made if all(callable(part) or isinstance(part, BaseTool) for part in parts) else found
    tools = tools_in(found, name)
    if not tools:
        raise ConfigurationError(f"--tools {name!r} gives {found!r}; it must be a LangChain tool, or a list of them.")
    return tools


def _needs_arguments(function: Callable[..., Any]) -> bool:
    """Whether it can't be called as it stands, as what makes tools can."""
    needed = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return inspect.iscoroutinefunction(function) or any(each.kind not in several for each in needed)


def open_model(name: str, **options: Any) -> BaseChatModel:
    """A chat model by its `init_chat_model` name, or FILE.py:ATTRIBUTE for one of the user's own.

    Raises:
        ConfigurationError, MissingDependencyError: there is no such model, or its package is not installed.
    """
    if ".py:" not in name:
        from metis_agent.judging.rubric import open_chat_model

        return open_chat_model(name, **options)
    from langchain_core.language_models import BaseChatModel

    found = load_attribute(name)
    chat = found() if callable(found) and not isinstance(found, BaseChatModel) else found
    if not isinstance(chat, BaseChatModel):
        raise ConfigurationError(
            f"{name!r} is {chat!r}; it must be a LangChain chat model, or a function that makes one."
        )
    return chat


def open_base(name: str) -> BaseChatModel:
    """The base model, to be sampled from at temperature 1: a local folder, or an `init_chat_model` name.

    Raises:
        CheckpointError: the folder holds no causal language model.
        ConfigurationError, MissingDependencyError: as `open_chat_model`.
    """
    if not os.path.isdir(name):
        return open_model(name, temperature=1.0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch

        from metis_agent.models.local import LocalChatModel
    except ImportError as missing:
        raise MissingDependencyError(
            f"the local model {name!r} needs {missing.name!r}; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    return LocalChatModel.load(name, temperature=1.0, device="cuda" if torch.cuda.is_available() else "cpu")


def agent_builder(model: BaseChatModel, tools: Sequence[BaseTool]) -> Callable[[Gate], MetisAgent]:
    """The agent around a gate, as rollouts take it."""
    from metis_agent.agent import create_metis_agent

    return lambda gate: create_metis_agent(model, list(tools), gate=gate)


def work_folder(work: Path | None, out: str) -> Path:
    """Where caches and indices go: they need a local folder.

    Raises:
        ConfigurationError: none is given, and the outcome goes elsewhere than to a local folder.
    """
    if work is not None:
        return work
    if "://" in out:
        raise ConfigurationError(f"--out {out!r} is not on this machine; name a local folder for caches with --work.")
    return Path(out) / "work"


def show_report(console: Console, report: CurationReport, *, rows: str, not_run: Sequence[str]) -> None:
    """What each stage did, and that the sum is right."""
    table = Table(title=f"{report.rows} {rows}", title_justify="left")
    for heading in ("stage", "in", "out", "why the others did not go on"):
        table.add_column(heading, justify="right" if heading in ("in", "out") else "left")
    for stage in report.stages:
        why = [f"{count} {reason}" for reason, count in stage.dropped.most_common()]
        why += [f"[yellow]{count} undecided: {reason}[/]" for reason, count in stage.undecided.most_common()]
        why += [f"[dim]({count} went on: {note})[/]" for note, count in stage.notes.most_common()]
        table.add_row(stage.name, str(stage.rows_in), str(stage.rows_out), "; ".join(why))
    console.print(table)
    console.print(
        f"{report.rows} in = {report.kept.total()} kept + {report.dropped} dropped + {report.undecided} undecided."
    )
    if report.unreadable:
        console.print(f"{report.unreadable} lines of the store hold no record; they are where they were.")
    for name in not_run:
        console.print(f"[yellow]Not run:[/] {name}.")
