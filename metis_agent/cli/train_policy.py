"""`metis train policy`: HDPO on the whole model, from one YAML file.

Errors in the file name the key, what is there and what should be.
"""

from __future__ import annotations

import difflib
import json as json_module
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from metis_agent.cli.output import (
    FreshOption,
    JsonOption,
    prepare_folder,
    progress_bars,
    quiet_libraries,
    screen,
    step_bar,
    training_libraries,
    write_json,
)
from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.formats import RUN_FILE

if TYPE_CHECKING:
    from metis_agent.cli.policy_run import PolicyRun
    from metis_agent.types import Question

__all__ = ["CONFIGS", "locate", "parse_value", "read_run", "train_policy_command", "train_run"]

_PARTS = ("checkpoints", "trajectories", "policy", "metrics.jsonl", "policy.json")
"""What a run makes in its folder."""
_SHOWN = (
    ("hdpo/accuracy", "accuracy"),
    ("hdpo/tool_rate", "tools"),
    ("hdpo/redundant_rate", "redundant"),
    ("hdpo/rho", "rho"),
    ("hdpo/excluded", "excluded"),
    ("loss", "loss"),
)
_VALIDATED = (
    ("validation/accuracy", "accuracy"),
    ("validation/tool_rate", "tools"),
    ("validation/redundant_rate", "redundant"),
    ("validation/necessary_recall", "necessary"),
)


def train_policy_command(
    config: Annotated[
        str,
        typer.Option(
            "--config", help="A YAML file, or a packaged one: laptop, pretrained, qwen3-vl-8b, qwen3-vl-8b-nodes."
        ),
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE: change one key, such as training.steps=5; repeat.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check everything and say what would be done.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the file, to copy and change.")] = False,
    fresh: FreshOption = False,
    json: JsonOption = None,
) -> None:
    """Train a policy by HDPO on its own rollouts through the agent's graph.

    Example: metis train policy --config laptop

    Example: accelerate launch --config_file fsdp.yaml --module metis_agent.cli train policy --config mine.yaml

    A run that was stopped, by Ctrl-C or worse, goes on from its last checkpoint with the same command; rollouts that
    were finished are not run again.
    """
    console = screen(json)
    console.quiet = not _is_main()
    if show:
        console.print(locate(config).read_text(encoding="utf-8"), markup=False, highlight=False)
        return
    with training_libraries():
        from metis_agent.cli.policy_run import check_reporters, model_folder, processes
    run = read_run(config, changes or ())
    count = processes()
    generation, accumulated = run.batches(count)
    rollouts = run.training.questions_per_step * run.groups.size
    console.print(
        f"{run.training.steps} steps of {run.training.questions_per_step} questions times {run.groups.size} rollouts = "
        f"{rollouts} a step; {count} {'process' if count == 1 else 'processes'}, each {generation} micro-batches of "
        f"{run.training.micro_batch}, an update every {accumulated}."
    )
    if check:
        try:
            check_reporters(run.report_to)
        except MissingDependencyError as missing:
            console.print(f"[yellow]Before the run:[/] {missing}", highlight=False)
        if not Path(model_folder(run)).is_dir():
            console.print(
                f"[yellow]There is no folder[/] {run.model.path!r} here: the model goes there before the run."
            )
        console.print("The configuration is sound.")
        return
    check_reporters(run.report_to)  # before any work
    quiet_libraries()
    # TRL 1.16 reads names that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    with training_libraries():
        figures = _train(run, console, fresh=fresh)
    if json is not None and _is_main():
        write_json(json, figures)


def _train(run: PolicyRun, console: Console, *, fresh: bool) -> dict[str, Any]:
    from metis_agent.cli.policy_run import model_folder, processes
    from metis_agent.models.checkpoint import load_checkpoint

    out = Path(run.output)
    if fresh and processes() > 1:
        raise ConfigurationError(
            f"--fresh with {processes()} processes: some would be at work while one clears up. Remove {run.output!r} "
            "first."
        )
    if _is_main():
        prepare_folder(out, run.model_dump(mode="json"), console, parts=_PARTS, option="output", fresh=fresh)
    else:
        _wait_for(out / RUN_FILE)
    history = train_run(run, load_checkpoint(model_folder(run), dtype=run.model.dtype), out, console)
    figures = {
        "policy": str(out / "policy"),
        "steps": run.training.steps * run.training.updates_per_step,
        "last": history[-1],
    }
    if _is_main():
        write_json(out / "policy.json", figures)
    console.print(f"Policy: {out / 'policy'}   Metrics: {out / 'metrics.jsonl'}")
    return figures


def train_run(
    run: PolicyRun, loaded: Any, out: Path, console: Console, *, questions: Sequence[Question] | None = None
) -> list[dict[str, Any]]:
    """Train, or go on from the last checkpoint; the policy is left in `out/policy`, adapters merged into it.

    `console` shows the steps; everything else is as `build_trainer` takes it.

    Returns:
        The metrics of each step.
    """
    from metis_agent.cli.policy_run import build_trainer
    from metis_agent.hdpo.config import last_checkpoint, save_whole

    with progress_bars(console) as bars:
        shown = [step_bar(bars, "train"), _step_lines(console, out)]
        trainer = build_trainer(run, loaded, out, callbacks=shown, questions=questions)
        found = last_checkpoint(out / "checkpoints")
        trainer.train(resume_from_checkpoint=str(found) if found else None)
    save_whole(trainer, out / "policy")
    if _is_main():
        # A model that sees is loaded with its processor, which holds the tokenizer.
        (loaded.processor or loaded.tokenizer).save_pretrained(out / "policy")
    return [entry for entry in trainer.state.log_history if "hdpo/rho" in entry]


def _step_lines(console: Console, out: Path) -> Any:
    """A callback that prints a line a step, and keeps all metrics in a file."""
    from transformers import TrainerCallback

    class StepLines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or not state.is_world_process_zero:
                return
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_module.dumps({"step": state.global_step, **logs}, default=float) + "\n")
            if "hdpo/rho" in logs:
                console.print(f"step {state.global_step:>4}  {_line(logs, _SHOWN)}", highlight=False)
            if "validation/accuracy" in logs:
                console.print(f"step {state.global_step:>4}  [bold]validation[/]  {_line(logs, _VALIDATED)}")

    return StepLines()


def _line(logs: Mapping[str, Any], names: tuple[tuple[str, str], ...]) -> str:
    return "  ".join(f"{shown} {float(logs[name]):.3g}" for name, shown in names if logs.get(name) is not None)


def _wait_for(path: Path, seconds: float = 60.0) -> None:
    """Until the first process has made the folder ready."""
    import time

    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise ConfigurationError(f"{str(path)!r} did not appear: all processes must see the same output folder.")
        time.sleep(0.1)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


CONFIGS = Path(str(files("metis_agent.hdpo") / "configs"))
"""The packaged files."""


def read_run(
    path: str | Path, changes: Sequence[str] = (), fixed: Mapping[str, Any] = MappingProxyType({})
) -> PolicyRun:
    """Read and check a configuration.

    Args:
        path: A YAML file, or the name of a packaged one such as "laptop".
        changes: KEY=VALUE each, such as "training.steps=5"; the value is YAML.
        fixed: values of further keys, which a command sets itself.

    Raises:
        ConfigurationError: it can't be read, or a key is wrong: which, what is there, and what should be.
    """
    from metis_agent.cli.policy_run import PolicyRun

    place = locate(str(path))
    found = parse_value(place.read_text(encoding="utf-8"), str(place))
    if not isinstance(found, dict):
        raise ConfigurationError(f"{str(place)!r} holds {found!r}; it must be a mapping of keys, such as 'model:'.")
    for change in changes:
        _change(found, change)
    for key, value in fixed.items():
        _put(found, key, value, f"{key}={value!r}")
    try:
        return PolicyRun.model_validate(found)
    except ValidationError as error:
        raise ConfigurationError(
            f"{str(place)!r}: " + "; ".join(_explained(each, PolicyRun) for each in error.errors())
        ) from None


def locate(path: str) -> Path:
    """The file itself, or the packaged one of this name.

    Raises:
        ConfigurationError: there is neither.
    """
    place, packaged = Path(path), CONFIGS / f"{path}.yaml"
    if place.is_file():
        return place
    if packaged.is_file():
        return packaged
    names = sorted(found.stem for found in CONFIGS.glob("*.yaml"))
    raise ConfigurationError(f"there is no file {path!r}; name a YAML file, or a packaged one of {names!r}.")


def parse_value(text: str, place: str) -> Any:
    """What a text of YAML says.

    Raises:
        ConfigurationError: it is none.
    """
    try:
        import yaml
    except ImportError as missing:
        raise MissingDependencyError(
            "a configuration needs 'yaml'; install it with: pip install 'langgraph-metis[train]'"
        ) from missing
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{place!r} is no YAML: {' '.join(str(error).split())}") from None


def _change(found: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not (key and equals):
        raise ConfigurationError(f"--set {change!r} changes nothing: write KEY=VALUE, such as training.steps=5.")
    _put(found, key, parse_value(value, f"--set {change}"), change)


def _put(found: dict[str, Any], key: str, value: Any, change: str) -> None:
    *path, last = key.split(".")
    part: Any = found
    for name in path:
        part = part.setdefault(name, {}) if isinstance(part, dict) else None
    if not isinstance(part, dict):
        raise ConfigurationError(f"--set {change!r}: {key!r} leads into something that is no mapping.")
    part[last] = value


def _explained(error: Mapping[str, Any], run: type[PolicyRun]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "missing":
        return f"{key} is missing; every run needs it"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys(run), n=1)
        return f"{key} is no key of a run" + (f"; did you mean {near[0]!r}?" if near else "; take it out")
    if error["type"] == "value_error":  # what a settings class of the library says itself
        return f"{key}: {error['ctx']['error']}"
    return f"{key} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(part: Any) -> list[str]:
    names: list[str] = []
    for name, kind in get_type_hints(part).items():
        names.append(name)
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner) or (isinstance(inner, type) and issubclass(inner, BaseModel)):
                names += _keys(inner)
    return names
