"""Options made from settings: `takes_settings` turns the fields of a class into options of a command.

The classes are the library's own (`metis_agent.hdpo.settings`), whose documentation becomes the help, or stand here:
`Records`, where outcomes come from (a table by `--outcomes`, trajectories by `--store`) and how they are read, and
`PolicyChoice`, what reads the questions of a gate.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from metis_agent.cli.agent_options import (
    AgreementOption,
    JudgeOption,
    RubricOption,
    VerifierOption,
    verify_with,
)
from metis_agent.cli.output import RayOption, progress_bars, training_libraries
from metis_agent.errors import ConfigurationError, MissingDependencyError

if TYPE_CHECKING:
    from metis_agent.hdpo.policies import Policy
    from metis_agent.recording.store import StoreReport
    from metis_agent.rollouts.outcomes import OutcomeTable
    from metis_agent.types import Trajectory

__all__ = ["PolicyChoice", "Records", "SeedOption", "forget_training", "runs_of", "takes_settings"]

_PACKAGED = ("features", "encoder", "decision_lm")
_READS, _TABLE, _STORE = "What reads the questions", "Outcomes from a table", "Outcomes from a store"
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same result.")]
VERDICTS = "verdicts.sqlite"
"""File of a store in which a judge's verdicts are kept."""


@dataclass(frozen=True, kw_only=True)
class PolicyChoice:
    """What reads the questions of a gate; each field is an option.

    Raises:
        ConfigurationError: they don't go together.
    """

    policy: Annotated[
        str,
        typer.Option(
            help="'features': n-grams and numbers, no download, seconds. 'encoder': a sequence classifier, from some "
            "thousand rows on. 'decision_lm': a chat model, which knows tools by their descriptions (--describe). Or "
            "FILE.py:ATTRIBUTE for a kind of your own.",
            rich_help_panel=_READS,
        ),
    ] = "features"
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="For 'encoder' and 'decision_lm': a folder that save_pretrained wrote, or a name on the Hub.",
            rich_help_panel=_READS,
        ),
    ] = None
    lora: Annotated[
        bool,
        typer.Option(
            "--lora", help="For 'decision_lm': train low-rank adapters, merged at the end.", rich_help_panel=_READS
        ),
    ] = False
    epochs: Annotated[
        int | None, typer.Option(min=1, help="At most; held-out loss stops it earlier.", rich_help_panel=_READS)
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions a step.", rich_help_panel=_READS)] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Default: 3e-5 for 'encoder', 1e-5 for 'decision_lm', 1e-4 with --lora.", rich_help_panel=_READS
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu or cuda:1; by default the accelerator, if any.", rich_help_panel=_READS),
    ] = None

    def __post_init__(self) -> None:
        if self.policy not in _PACKAGED and ":" not in self.policy:
            raise ConfigurationError(
                f"--policy {self.policy!r} is none of {', '.join(_PACKAGED)}; or name a policy of your own, "
                "FILE.py:ATTRIBUTE."
            )
        given = {name for name in ("model", "epochs", "batch_size", "learning_rate", "device") if getattr(self, name)}
        if self.policy not in _PACKAGED[1:] and (given or self.lora):
            names = sorted(f"--{name.replace('_', '-')}" for name in given | ({"lora"} if self.lora else set()))
            raise ConfigurationError(
                f"{', '.join(names)} with --policy {self.policy!r}, which has no model: add --policy encoder or "
                "--policy decision_lm."
            )
        if self.policy in _PACKAGED[1:] and not self.model:
            example = "answerdotai/ModernBERT-base" if self.policy == "encoder" else "Qwen/Qwen3-0.6B"
            raise ConfigurationError(
                f"--policy {self.policy!r} needs --model: a folder that save_pretrained wrote, or a name on the Hub "
                f"such as {example!r}. Without one, use --policy features."
            )
        if self.lora and self.policy != "decision_lm":
            raise ConfigurationError(f"--lora with --policy {self.policy!r}: adapters are for --policy decision_lm.")

    def build(self, bars: Progress, out: Path, rows: int, descriptions: Mapping[str, str], seed: int) -> Policy:
        """The policy; it shows its progress, and keeps the state of a long training beside `out`.

        Raises:
            ConfigurationError: the model's folder is not there.
            MissingDependencyError: an extra is not installed.
        """
        if self.policy == "features":
            from metis_agent.hdpo.policies.features import FeaturesPolicy

            read = bars.add_task("read the questions", total=rows)
            return FeaturesPolicy(progress=lambda count: bars.advance(read, count))
        if self.policy not in _PACKAGED:
            from metis_agent.cli.agent_options import load_attribute

            found = load_attribute(self.policy)
            own: Policy = found() if isinstance(found, type) else found
            return own
        task = bars.add_task("train", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total)

        try:
            return self._torch_policy(progress, _state_folder(out), descriptions, seed)
        except ModuleNotFoundError as missing:
            raise MissingDependencyError(
                f"--policy {self.policy!r} needs {missing.name!r}; "
                "install it with: pip install 'langgraph-metis[train]'"
            ) from missing

    def _torch_policy(self, progress: Any, state: Path, descriptions: Mapping[str, str], seed: int) -> Policy:
        from metis_agent.hdpo.policies.decision_lm import DecisionLMPolicy, Lora
        from metis_agent.hdpo.policies.encoder import EncoderPolicy
        from metis_agent.hdpo.settings import GradientTraining

        rates = {"encoder": 3e-5, "decision_lm": 1e-4 if self.lora else 1e-5}
        training = GradientTraining(
            epochs=self.epochs or (10 if self.policy == "encoder" else 5),
            batch_size=self.batch_size or 16,
            learning_rate=rates[self.policy] if self.learning_rate is None else self.learning_rate,
            seed=seed,
            resume=state,
        )
        model = str(self.model)
        if self.policy == "encoder":
            return EncoderPolicy(model=model, training=training, device=self.device, progress=progress)
        return DecisionLMPolicy(
            model=model,
            descriptions=descriptions,
            lora=Lora() if self.lora else None,
            training=training,
            device=self.device,
            progress=progress,
        )


def forget_training(out: Path) -> None:
    """Delete the state of a training whose gate is written."""
    shutil.rmtree(_state_folder(out), ignore_errors=True)


def _state_folder(out: Path) -> Path:
    return out.parent / f"{out.name}.training"


@dataclass(frozen=True, kw_only=True)
class Records:
    """Where outcomes come from; each field is an option of every command that takes them."""

    outcomes: Annotated[
        Path | None,
        typer.Option(
            help="Table with a row a question (.parquet, .csv, .jsonl): 'question', for each branch "
            "'<branch>_correct' in 0..1, optional 'context', '<branch>_cost', '<branch>_seconds', '<branch>_answer' "
            "and 'draft_*'.",
            rich_help_panel=_TABLE,
        ),
    ] = None
    tool: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=BRANCH: the agent's tool and its branch in the table; repeat for more. With --store NAME alone; "
            "by default all tools that were recorded."
        ),
    ] = None
    direct: Annotated[str, typer.Option(help="Branch of the answers without a tool.", rich_help_panel=_TABLE)] = (
        "direct"
    )
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with what came along with the question (a table, a passage); repeat to join several. By "
            "default those of 'context', 'table', 'text' and 'passage' that are there.",
            rich_help_panel=_TABLE,
        ),
    ] = None
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Column whose rows stay on one side of every split, such as the document asked about; with --store a "
            "further column of the questions' file."
        ),
    ] = None
    store: Annotated[
        str | None,
        typer.Option(help="Folder or URL of recorded trajectories: see `metis rollout`.", rich_help_panel=_STORE),
    ] = None
    of_model: Annotated[
        str | None, typer.Option(help="Only runs of this model, as it was named then.", rich_help_panel=_STORE)
    ] = None
    draft: Annotated[
        bool,
        typer.Option(
            "--draft",
            help="Read what direct runs show of themselves: the gate will then ask for a direct draft before it "
            "decides.",
            rich_help_panel=_STORE,
        ),
    ] = False
    declared_cost: Annotated[
        bool,
        typer.Option(
            "--declared-cost",
            help="A tool costs what it declares (metadata={'cost': ...}); by default 1 a call.",
            rich_help_panel=_STORE,
        ),
    ] = False

    verifier: VerifierOption = None
    judge: JudgeOption = None
    judge_rubric: RubricOption = None
    agreement: AgreementOption = False
    ray: RayOption = None

    def load(self, console: Console, *, tools: Sequence[str] | None = None, every_step: bool = False) -> OutcomeTable:
        """Read them.

        Args:
            console: Says what was read, and what was left out.
            tools: Names of the tools where the options give none, such as those of a gate.
            every_step: Read a store's decision points, for a gate that decides at every step.

        Raises:
            MissingDependencyError: the `train` extra is not installed.
            ConfigurationError: not one source, or a --tool that does not fit it.
            InputError: see `read_outcomes` and `OutcomePool`.
        """
        if (self.outcomes is None) == (self.store is None):
            raise ConfigurationError(
                f"--outcomes is {self.outcomes!r} and --store {self.store!r}: give one of them, a table of outcomes or "
                "a store of trajectories."
            )
        with training_libraries():
            if self.outcomes is not None:
                from metis_agent.rollouts.outcomes import read_outcomes

                return read_outcomes(
                    self.outcomes, direct=self.direct, tools=self._branches(), context=self.context or None,
                    group_by=self.group_by,
                )  # fmt: skip
            return self._pool(console, tools, every_step)

    def other(self, outcomes: Path) -> Records:
        """The same options on another table."""
        return Records(**{**self.__dict__, "outcomes": outcomes, "store": None})

    def _branches(self) -> dict[str, str]:
        branches: dict[str, str] = {}
        for text in self.tool or []:
            name, equals, branch = text.partition("=")
            if not (name and equals and branch) or name in branches:
                raise ConfigurationError(
                    f"--tool {text!r}: write NAME=BRANCH, each name once, as in --tool text_search=search."
                )
            branches[name] = branch
        return branches

    def _pool(self, console: Console, tools: Sequence[str] | None, every_step: bool) -> OutcomeTable:
        from metis_agent.judging.judge import own_answers
        from metis_agent.recording.store import TrajectoryStore
        from metis_agent.rollouts.points import PointPool
        from metis_agent.rollouts.recorded import OutcomePool, pool_store

        names = self.tool or tools
        if names and (bad := [name for name in names if "=" in name or names.count(name) > 1]):
            raise ConfigurationError(f"--tool {bad[0]!r}: with --store write the tool's name alone, each once.")
        if every_step and self.draft:
            raise ConfigurationError("--draft with a gate that decides at every step, which reads none: leave it out.")
        url = str(self.store)
        verify = partial(
            verify_with, self.verifier, self.judge, self.judge_rubric,
            cache=None if "://" in url else Path(url) / VERDICTS,
            own=own_answers(self._of_the_model(console)) if self.agreement else None,
        )  # fmt: skip
        shards = TrajectoryStore(url, read_only=True).shards()
        reports: list[StoreReport] = []
        with progress_bars(console) as bars:
            task = bars.add_task("read the store", total=len(shards))

            def read(report: StoreReport) -> None:
                bars.advance(task)
                reports.append(report)

            pool = pool_store(
                url, kind=PointPool if every_step else OutcomePool, verify=verify if self.ray else cache(verify),
                ray=self.ray, progress=read, tools=names, use_cost=self.declared_cost, draft=self.draft,
                group_by=self.group_by, model=self.of_model, trust_verdicts=self.verifier is not None,
            )  # fmt: skip
        _tell_bad_lines(console, reports)
        table = pool.table()
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in table.dropped.items())
        console.print(
            (
                f"{len({*table.runs}):,} runs: {len(table):,} decision points, with {escape(', '.join(table.tools))}."
                if every_step
                else f"{pool.runs:,} runs: {len(table):,} questions down all of {escape(', '.join(table.actions))}."
            )
            + (f" Left out: {left_out}." if left_out else "")
        )
        return table

    def _of_the_model(self, console: Console) -> Iterator[Trajectory]:
        for run in runs_of(str(self.store), console):
            if self.of_model is None or run.metadata.get("model") == self.of_model:
                yield run


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of each parameter that is a settings class, an option for each field of it.

    A field that says nothing of the command line becomes an option by its name, its default and the documentation that
    stands below it. One that a command line can't give, such as a mapping, stays the library's alone.
    """
    own = inspect.signature(command, eval_str=True).parameters
    kinds: dict[str, Any] = {name: each.annotation for name, each in own.items()}
    classes = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and is_dataclass(kind)}
    options = {name: _options(each) for name, each in classes.items()}

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        settings = {
            name: each(**{option.name: given.pop(option.name) for option in options[name]})
            for name, each in classes.items()
        }
        command(**settings, **given)

    alone = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in own.items() if name not in classes]
    shown = [*alone, *itertools.chain.from_iterable(options.values())]
    with_options.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    del with_options.__wrapped__  # the options are its own
    return with_options


_PLAIN = {bool, int, float, str, type(None)}


def _options(settings: Any) -> list[inspect.Parameter]:
    words = _documentation(settings)
    hints = get_type_hints(settings, include_extras=True)
    options = []
    for field in fields(settings):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            if not {*(get_args(hint) if isinstance(hint, UnionType) else (hint,))} <= _PLAIN:
                continue
            flag = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
            hint = Annotated[hint, typer.Option(*flag, help=words.get(field.name))]
        options.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hint)
        )
    return options


def _documentation(settings: Any) -> dict[str, str]:
    """What stands below each field in the source."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    body = found.body if isinstance(found, ast.ClassDef) else []
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def runs_of(url: str, console: Console, *, whole: bool = False) -> Iterator[Trajectory]:
    """The trajectories of a store, with a bar; says at the end how many lines were bad.

    Messages and model calls, which scoring does without, come only where they are asked for (`whole`).
    """
    from metis_agent.recording.store import TrajectoryStore

    store = TrajectoryStore(url, read_only=True)
    with progress_bars(console) as bars:
        yield from bars.track(store.read(whole=whole), total=store.count(), description="read the store")
    _tell_bad_lines(console, [store.report])


def _tell_bad_lines(console: Console, reports: Sequence[StoreReport]) -> None:
    if first := next((report.bad_lines[0] for report in reports if report.bad_lines), None):
        bad = sum(report.torn + report.corrupt for report in reports)
        console.print(f"{bad} lines of the store could not be read; the first: {first.shard} line {first.line}.")
