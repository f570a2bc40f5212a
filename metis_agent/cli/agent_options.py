"""Options that say which agent to run, and how its answers are judged.

An agent is a model by name or folder with tools from a module, or an agent of the user's own. Python objects are named
`package.module:attribute` or `path/to/file.py:attribute`; the current folder is searched first. Where a model is named
and no tools are, the commands that can do with it take the sandboxed python tool.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.tools import tool as as_tool
from langgraph.pregel import Pregel

from metis_agent.agent import MetisAgent, create_metis_agent
from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.gates.base import Gate
from metis_agent.rules.budget import Budget
from metis_agent.tools.python import PythonTool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from metis_agent.judging.verifiers import Verify
    from metis_agent.types import Question

__all__ = [
    "AgentOption",
    "AgreementOption",
    "Choice",
    "JudgeOption",
    "ModelOption",
    "RubricOption",
    "ToolsOption",
    "VerifierOption",
    "check_verifiers",
    "choose_agent",
    "load_attribute",
    "load_chat_model",
    "named_gate",
    "python_tools",
    "seeing_python",
    "tools_in",
    "verify_with",
]

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A model that LangChain's init_chat_model knows ('openai:gpt-5'), a folder with a local model, or "
        "FILE.py:ATTRIBUTE for a chat model of your own."
    ),
]
ToolsOption = Annotated[
    list[str] | None,
    typer.Option(help="MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE: a tool, a function, or a list of them; repeat for more."),
]
AgentOption = Annotated[
    str | None,
    typer.Option(
        help="Instead of --model and --tools, MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE: a MetisAgent, a pair (model, "
        "tools), a function that returns either, or a function that takes a gate and makes an agent: a MetisAgent, or "
        "one of create_agent with MetisGateMiddleware(gate)."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An agent to run, without its gate."""

    build: Callable[[Gate], Pregel[Any, Any, Any, Any]]
    """A `MetisAgent`, or an agent of `create_agent` behind the middleware."""
    tools: tuple[str, ...]
    undeclared: tuple[str, ...]
    """Of the tools, those that are not declared to change nothing."""
    model: str
    """What records call the model."""
    concurrency: int = 16
    """Runs at once that suit it."""


def choose_agent(
    model: str | None,
    tools: Sequence[str] | None,
    agent: str | None,
    *,
    system_prompt: str | None = None,
    calls: int = Budget.calls,
    temperature: float | None = None,
    label: str | None = None,
    base_url: str | None = None,
) -> Choice:
    """The agent that the options name.

    Args:
        model: See `ModelOption`.
        tools: See `ToolsOption`.
        agent: See `AgentOption`.
        system_prompt: For the model; an agent of the user's own has its own.
        calls: Tool calls a turn, likewise.
        temperature: Of the model's sampling; its own default where not given.
        label: What records call the model, by default its name in the options.
        base_url: Of an endpoint that speaks OpenAI's protocol; `model` is then its model's name.

    Raises:
        ConfigurationError: neither or both are named, or what is named is not there or is something else.
    """
    from metis_agent.gates.reference import ModelGate
    from metis_agent.rollouts.branches import undeclared_tools
    from metis_agent.rollouts.runner import tools_of

    if (agent is None) == (model is None):
        raise ConfigurationError(f"--agent is {agent!r} and --model {model!r}: give one of them.")
    if agent is not None and tools:
        raise ConfigurationError(f"--tools {tools!r} goes with --model: the agent {agent!r} brings its own.")
    if base_url is not None and model is None:
        raise ConfigurationError(f"--base-url {base_url!r} goes with --model: the agent {agent!r} brings its own.")
    concurrency = 16
    build: Callable[[Gate], Pregel[Any, Any, Any, Any]]
    if agent is not None:
        found = load_attribute(agent)
        build = _builder(found, agent, system_prompt, calls)
    else:
        chat, concurrency = _chat_model(str(model), temperature, base_url)
        parts = [part for name in tools or () for part in tools_in(load_attribute(name), name)]
        build = partial(_create, chat, parts, system_prompt, calls)
    offered = tools_of(build(ModelGate()))
    if not offered:
        remedy = f"give {agent!r} some" if model is None else "name some with --tools MODULE:ATTRIBUTE"
        raise ConfigurationError(f"The agent has no tools, so there is nothing to decide: {remedy}.")
    return Choice(
        build=build,
        tools=tuple(offered),
        undeclared=tuple(undeclared_tools(offered.values())),
        model=label or str(agent or model),
        concurrency=concurrency,
    )


def load_attribute(name: str) -> Any:
    """The object named `package.module:attribute` or `path/to/file.py:attribute`.

    Raises:
        ConfigurationError: there is no such thing.
    """
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise ConfigurationError(f"{name!r} names no object: write MODULE:ATTRIBUTE or FILE.py:ATTRIBUTE.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise ConfigurationError(
            f"{name!r} can't be imported from {str(Path.cwd())!r}: {type(error).__name__}: {error}. Check the path, "
            "and that what it imports is installed."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = sorted(each for each in dir(found) if not each.startswith("_"))
            raise ConfigurationError(f"{place!r} has no {part!r}; it has {public!r}.")
        found = getattr(found, part)
    return found


def tools_in(found: Any, name: str) -> list[BaseTool]:
    """The tools of what an option names: a tool, a function or class to make one of, or a list of them.

    Raises:
        ConfigurationError: it is something else, or a function of which no tool can be made.
    """
    made = found() if isinstance(found, type) else found
    return [_tool(part, name) for part in (made if isinstance(made, list | tuple) else [made])]


def _tool(part: Any, name: str) -> BaseTool:
    made = part() if isinstance(part, type) else part
    if isinstance(made, BaseTool):
        return made
    if not callable(made):
        raise ConfigurationError(f"{name!r} holds {made!r}, which is no tool: pass LangChain tools or functions.")
    try:
        return cast(BaseTool, as_tool(made))
    except ValueError as error:
        raise ConfigurationError(
            f"{name!r} holds {made!r}, of which no tool can be made: {error} Give the function a docstring that tells "
            "the model what it does, or pass a LangChain tool."
        ) from error


def _load_file(path: Path) -> Any:
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ImportError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    if known is None:
        sys.modules[name] = module
    # Its neighbours can be imported, as if it had been run.
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def load_chat_model(name: str, temperature: float | None = None) -> Any:
    """A chat model by what `ModelOption` takes.

    Raises:
        ConfigurationError: there is no such thing.
        MissingDependencyError: it needs what is not installed.
    """
    return _chat_model(name, temperature)[0]


def named_gate(name: str) -> Gate:
    """A gate by its folder, or "model", "always" or "never"."""
    from metis_agent.gates import AlwaysGate, ModelGate, NeverGate, PolicyGate

    plain: dict[str, type[Gate]] = {"model": ModelGate, "always": AlwaysGate, "never": NeverGate}
    return plain[name]() if name in plain else PolicyGate(Path(name))


def _chat_model(name: str, temperature: float | None, base_url: str | None = None) -> tuple[Any, int]:
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    if base_url is not None:
        return _endpoint(name, base_url, options), 16
    if Path(name).is_dir():
        from metis_agent.cli.output import training_libraries

        with training_libraries():
            from metis_agent.models.local import LocalChatModel

            chat = LocalChatModel.load(name, **options)
            return chat, chat.max_batch
    if ".py:" in name:
        found = load_attribute(name)
        if temperature is not None:
            raise ConfigurationError(f"--temperature {temperature!r} is for models by name; set it in {name!r}.")
        return found if isinstance(found, Runnable) else found(), 16
    from metis_agent.judging.rubric import open_chat_model

    return open_chat_model(name, **options), 16


def _endpoint(name: str, base_url: str, options: dict[str, Any]) -> Any:
    try:
        from langchain_openai import ChatOpenAI
    except ImportError as missing:
        raise MissingDependencyError(
            "--base-url needs langchain-openai; install it with: pip install 'langgraph-metis[vllm]'"
        ) from missing
    # Servers of one's own mostly want no key, and the client refuses to be without.
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return ChatOpenAI(model=name, base_url=base_url, api_key=key, **options)  # type: ignore[arg-type]


def _builder(
    found: Any, name: str, system_prompt: str | None, calls: int
) -> Callable[[Gate], Pregel[Any, Any, Any, Any]]:
    if isinstance(found, MetisAgent):
        return found.with_gate
    if callable(found):
        if _takes_a_gate(found):
            return partial(_checked, found, name)
        found = found()
        if isinstance(found, MetisAgent):
            return found.with_gate
    if isinstance(found, tuple | list) and len(found) == 2:
        return partial(_create, found[0], tools_in(found[1], name), system_prompt, calls)
    raise ConfigurationError(
        f"{name!r} is {found!r}; it must be a MetisAgent, a pair (model, tools), or a function that takes a gate and "
        "makes an agent: a MetisAgent, or one of create_agent with middleware=[MetisGateMiddleware(gate)]."
    )


def _takes_a_gate(found: Any) -> bool:
    import inspect

    needed = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.name == "gate" or parameter.default is parameter.empty
    ]
    return bool(needed)


def _checked(make: Callable[[Gate], Any], name: str, gate: Gate) -> Pregel[Any, Any, Any, Any]:
    agent = make(gate)
    if not isinstance(agent, MetisAgent):
        if isinstance(agent, Pregel) and "decisions" in agent.channels:
            return agent
        raise ConfigurationError(
            f"{name!r} made {agent!r} of a gate; it must make a MetisAgent, or an agent of create_agent with "
            "middleware=[MetisGateMiddleware(gate)] of that gate."
        )
    # A recorder of its own would store each run twice.
    return agent if agent.metis is not None and agent.metis.rules.recorder is None else agent.with_gate(gate)


def _create(model: Any, tools: Sequence[Any], system_prompt: str | None, calls: int, gate: Gate) -> MetisAgent:
    return create_metis_agent(
        model, tools, gate=gate, budget=Budget(calls=calls), system_prompt=system_prompt, record_calls=True
    )


python_tools = (PythonTool(images=False),)


seeing_python = (PythonTool(),)


_PANEL = "Judging answers"

VerifierOption = Annotated[
    str | None,
    typer.Option(
        help="Judge every answer by this, whatever its question names: prose (finds the answer in a sentence), exact, "
        "numeric, choice, math, judge, or FILE.py:ATTRIBUTE for a function of your own (question, answer) -> bool.",
        rich_help_panel=_PANEL,
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="A chat model that judges the questions whose verifier is 'judge', as --model names one; with --verifier "
        "judge all of them.",
        rich_help_panel=_PANEL,
    ),
]
RubricOption = Annotated[
    Path | None,
    typer.Option(
        "--judge-rubric", help="A text file that tells the judge when an answer is right.", rich_help_panel=_PANEL
    ),
]
AgreementOption = Annotated[
    bool,
    typer.Option(
        "--agreement",
        help="Take questions without an 'answer' too: right is what agrees with the answer of the question's own free "
        "run. Numbers, letters and equal texts are compared, of others the --judge rules. It says how many answers "
        "change, not how many are right.",
        rich_help_panel=_PANEL,
    ),
]


def verify_with(
    verifier: str | None,
    judge: str | None,
    rubric: Path | None = None,
    *,
    cache: Path | None = None,
    own: Mapping[str, str] | None = None,
) -> Verify:
    """What judges an answer.

    Args:
        verifier: see `VerifierOption`.
        judge: see `JudgeOption`.
        rubric: see `RubricOption`.
        cache: file for the judge's verdicts, so that none is paid for twice; in memory by default.
        own: what answers to questions without a reference are to agree with (see `own_answers`, `AgreementOption`).

    Raises:
        ConfigurationError: a verifier that is not known, or a judge asked for and none named.
    """
    from metis_agent.judging.verifiers import JUDGE, VERIFIERS, Verifier, verify

    verifiers: dict[str, Verifier] = dict(VERIFIERS)
    chat = None
    if judge is not None:
        from metis_agent.judging.judge import AnswerJudge
        from metis_agent.sqlite import DiskCache

        chat, kept = load_chat_model(judge, 0.0 if ".py:" not in judge else None), DiskCache(cache)
        verifiers[JUDGE] = AnswerJudge(chat, rubric="answer" if rubric is None else rubric, cache=kept)
    elif rubric is not None:
        raise ConfigurationError(f"--judge-rubric {str(rubric)!r} goes with --judge MODEL.")
    if verifier is not None and ":" in verifier:
        verifiers[verifier] = load_attribute(verifier)
    elif verifier is not None and verifier not in verifiers:
        remedy = "name the model with --judge" if verifier == JUDGE else f"choose of {sorted(verifiers)!r}"
        raise ConfigurationError(f"--verifier {verifier!r} is not known here; {remedy}, or give FILE.py:ATTRIBUTE.")
    by_reference = partial(verify, verifiers=verifiers, name=verifier)
    if own is None:
        return by_reference
    from metis_agent.judging.judge import Agreeing, AgreementJudge

    pair_judge = None if chat is None else AgreementJudge(chat, cache=kept)
    return Agreeing(own, verify=by_reference, pair_judge=pair_judge)


def check_verifiers(questions: Iterable[Question], verify: Verify) -> None:
    """Refuse, before any run is paid for, what could not be judged afterwards: one question of each verifier is tried.

    Raises:
        ConfigurationError: a verifier is not known, or no judge is named.
        MissingDependencyError: it needs an extra.
    """
    from metis_agent.judging.verifiers import JUDGE, VERIFIERS

    tried: set[str] = set()
    for question in questions:
        if question.verifier not in tried and question.answer is not None:
            tried.add(question.verifier)
            bound = getattr(verify, "keywords", {})
            if (bound.get("name") or question.verifier) != JUDGE or JUDGE not in bound.get("verifiers", VERIFIERS):
                verify(question, question.answer)
