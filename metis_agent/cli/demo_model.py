"""`metis demo --model`: the paper's two stages on a pretrained chat model, with questions and tools of one's own.

    as it is -> runs down each branch -> the right ones, direct where that does -> SFT -> HDPO, measured at each stage

Source: arXiv:2604.08545, the cold start and the reinforcement learning after it. The run's file is the packaged
`pretrained.yaml`, the training that of `metis train sft` and `metis train policy`. All is under one folder, and each
stage goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metis_agent.cli.demo import prepare_training, show_examples, show_metrics, write_curve
from metis_agent.cli.output import is_finished, prepare_folder, progress_bars, step_bar, training_libraries, write_json
from metis_agent.cli.train_policy import CONFIGS, parse_value, read_run, train_run
from metis_agent.errors import CheckpointError, ConfigurationError, InputError, MissingDependencyError
from metis_agent.hdpo.settings import SftSettings
from metis_agent.types import Branch, Question, Trajectory

if TYPE_CHECKING:
    from metis_agent.cli.policy_run import PolicyRun
    from metis_agent.curation.strategy import Lessons
    from metis_agent.evaluation.agents import Measurement
    from metis_agent.judging.verifiers import Verify

__all__ = ["Pretrained", "run_pretrained"]

_PARTS = ("model", "model.part", "trajectories", "cold_start", "checkpoints", "policy", "judge", "agreement",
          "metrics.jsonl", "cold_start.json", "hdpo.json", "metrics.json", "curve.png")  # fmt: skip
"""What a run makes in its folder."""
_BRANCHES: tuple[Branch, ...] = ("free", "direct", "tool")
_TITLES = {"as_is": "as it is", "cold_start": "cold start", "hdpo": "after HDPO"}
_LEAST = 3
"""Questions with a run to learn from, below which there is no cold start."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """The command's options."""

    model: str
    questions: str | None
    tools: tuple[str, ...] = ()
    chat_template: str | None = None
    system_prompt: str | None = None
    hold_out: float = 0.4
    samples: int = 4
    ends_only: bool = False
    changes: tuple[str, ...] = ()
    folder: Path = Path("runs/demo-model")
    seed: int = 0
    steps: int | None = None

    def configured(self) -> tuple[PolicyRun, SftSettings]:
        """The run's file, and how to fine-tune before it.

        Raises:
            ConfigurationError: a change is wrong.
        """
        with training_libraries():
            own = [change for change in self.changes if not change.startswith("sft.")]
            changed = {change.partition("=")[0] for change in own}
            options: dict[str, tuple[str, Any]] = {
                "output": ("--folder", str(self.folder)), "model.path": ("--model", str(self.folder / "cold_start")),
                "questions.train": ("--questions", str(self.questions)), "agent.tools": ("--tools", list(self.tools)),
                "training.seed": ("--seed", self.seed), "training.steps": ("--steps", self.steps),
                "agent.system_prompt": ("--system-prompt", self.system_prompt),
            }  # fmt: skip
            given = {key: value for key, (_, value) in options.items() if value is not None}
            if twice := sorted(changed & given.keys()):
                raise ConfigurationError(f"--set {twice[0]}: {options[twice[0]][0]} says this; leave the --set out.")
            run = read_run("pretrained", own, given)
            if run.model.lora is None and not changed & {"training", "training.learning_rate"}:
                run = read_run("pretrained", own, {**given, "training.learning_rate": 1e-6})  # the paper's
        lora = run.model.lora.rank if run.model.lora else 0
        fine: dict[str, Any] = {
            "lora": lora, "learning_rate": 2e-4 if lora else 2e-5, "seed": self.seed, "checkpoint_every": 20,
            "max_length": run.training.max_length,
        }  # fmt: skip
        for change in self.changes:
            if change.startswith("sft."):
                key, _, value = change.removeprefix("sft.").partition("=")
                fine[key] = parse_value(value, f"--set {change}")
        unknown = sorted(fine.keys() - {each.name for each in fields(SftSettings)})
        if unknown:
            raise ConfigurationError(f"--set sft.{unknown[0]}: there is no such setting; see `metis train sft --help`.")
        try:
            return run, TypeAdapter(SftSettings).validate_python(fine)
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":  # what the settings say themselves
                raise ConfigurationError(f"--set sft: {first['ctx']['error']}") from None
            raise ConfigurationError(f"--set sft.{first['loc'][0]} is {first['input']!r}: {first['msg']}.") from None


def run_pretrained(console: Console, own: Pretrained, *, fresh: bool) -> None:
    """Measure the model, start it warm on its own curated runs, train it by HDPO, and measure it after each.

    Raises:
        ConfigurationError, InputError, CheckpointError, MissingDependencyError: something is missing or does not fit;
            before any work, but for a model that does not load and runs of which too few are right.
    """
    run, fine = own.configured()
    train, test = _split(own, run.training.questions_per_step)
    folder = own.folder
    settings = {"model": own.model, "chat_template": own.chat_template, "hold_out": own.hold_out,
                "samples": own.samples, "run": run.model_dump(mode="json"), "sft": asdict(fine)}  # fmt: skip
    if not fresh and is_finished(folder, settings, console, option="--folder"):
        _say_what_next(console, folder)
        return
    source, template = _source(own.model), _template(own.chat_template)
    prepare_training()
    from metis_agent.cli.policy_run import tools_of_run, verify_of_run

    tools = tools_of_run(run)
    if not tools:
        raise ConfigurationError(
            "the agent has no tools, so there is nothing to decide: name some with --tools MODULE:ATTRIBUTE, or the "
            "sandboxed Python tool with --set agent.python=true."
        )
    started = time.perf_counter()
    prepare_folder(folder, settings, console, parts=_PARTS, option="--folder", fresh=fresh)
    verify = verify_of_run(run, folder)  # makes the judge's folder in it
    console.print(
        f"{escape(own.model)}: {len(train)} questions to learn from, {len(test)} held out.\n", highlight=False
    )
    stages = _Stages(run=run, folder=folder, tools=tools, verify=verify, console=console)
    base = _in_run(source, folder)
    before = stages.measure(base, "as_is", test, template)
    kept = stages.cold_start(base, train, own.samples, fine, template)
    between = {} if own.ends_only else {"cold_start": stages.measure(folder / "cold_start", "cold_start", test)}
    history = stages.hdpo(train)
    figures = {"as_is": before, **between, "hdpo": stages.measure(folder / "policy", "hdpo", test)}
    runs = {_TITLES[name]: measured for name, measured in figures.items()}
    show_examples(console, runs, lambda question: question.text)
    show_metrics(console, runs)
    if history:
        write_curve(folder / "curve.png", history)
    metrics = {
        **{name: it.to_dict() for name, it in figures.items()},
        "history": history,
        "kept": kept,
        "seed": own.seed,
        "steps": run.training.steps,
        "temperature": run.validation.temperature,
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / "metrics.json", metrics)  # last: it says that the run is finished
    console.print(f"\nFigures: {folder / 'metrics.json'}   curve: {folder / 'curve.png'}   policy: {folder / 'policy'}")
    _say_what_next(console, folder)


def _show_kept(console: Console, kept: Lessons) -> None:
    table = Table(title="Runs to learn from", title_justify="left")
    for heading in ("branch taken", *kept.figures):
        table.add_column(heading, justify="left" if heading == "branch taken" else "right")
    for branch in ("direct", "tool"):
        table.add_row(branch, *(str(counts[branch]) for counts in kept.figures.values()))
    console.print(table)
    cut = sum(kept.figures["cut off"].values())
    if cut:
        console.print(
            f"[bold yellow]{cut} right runs went on until they were cut off[/] and teach to ramble: they are not kept. "
            "Raise sampling.max_new_tokens by --set, lower sampling.temperature, or ask for short replies.",
            highlight=False,
        )  # fmt: skip
    if not kept.figures["kept"]["tool"]:
        console.print("[bold yellow]No call is among them[/]: the cold start teaches none.")


def _say_what_next(console: Console, folder: Path) -> None:
    console.print(
        f"Next: metis report --store {folder}/trajectories/hdpo --before {folder}/trajectories/as_is --history "
        f"{folder}/metrics.json --out report.html\n      metis ask --model {folder}/policy --tools ...   (or "
        f"LocalChatModel.load('{folder}/policy'), or vllm serve)\n      metis push   (with a card)",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


# --- what it starts from ---------------------------------------------------------------------------------------


def _split(own: Pretrained, least: int) -> tuple[list[Question], list[Question]]:
    """Questions to learn from, and held out; the same for the same seed.

    Raises:
        ConfigurationError, InputError: there is no file, answers are missing, or a part has too few.
    """
    from metis_agent.cli.agent_options import check_verifiers
    from metis_agent.judging.verifiers import verify
    from metis_agent.rollouts.questions import read_questions

    if own.questions is None or own.questions.isdecimal():
        raise ConfigurationError("--model needs --questions FILE: a .jsonl, .csv or .parquet file with answers.")
    asked = read_questions(own.questions)
    unanswered = [question for question in asked if question.answer is None]
    if unanswered:
        raise InputError(
            f"{len(unanswered)} of {len(asked)} questions in {own.questions!r} have no answer, the first "
            f"{unanswered[0].text[:80]!r}: what is right is all that there is to learn from. Add the column 'answer', "
            "or leave those rows out."
        )
    check_verifiers((question for question in asked if question.verifier != "judge"), verify)
    if not 0 < own.hold_out < 1:
        raise ConfigurationError(f"--hold-out {own.hold_out!r}: a share of the questions above 0 and below 1.")
    aside = {
        question.id
        for question in asked
        if zlib.crc32(f"held out {own.seed} {question.id}".encode(errors="surrogatepass")) < own.hold_out * 2**32
    }
    train = [question for question in asked if question.id not in aside]
    test = [question for question in asked if question.id in aside]
    if len(train) < least or len(test) < 5:
        raise InputError(
            f"{len(asked)} questions in {own.questions!r} give {len(train)} to learn from and {len(test)} held out: "
            f"it needs {least} (training.questions_per_step) and 5 at least, some hundreds of each to tell anything. "
            "Bring more, or change --hold-out or --set training.questions_per_step."
        )
    return train, test


def _source(model: str) -> Path:
    """Where the model is on this machine; one on the Hub is fetched into its cache.

    Raises:
        CheckpointError: it is neither here nor to be had.
        MissingDependencyError: a GGUF file, and what reads it is not installed.
    """
    from importlib.util import find_spec

    place = Path(model).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise CheckpointError(f"There is no file {model!r}.")
        if find_spec("gguf") is None:
            raise MissingDependencyError("a GGUF file needs its reader; install it with: pip install gguf")
        return place
    if place.is_dir():
        return place
    if not model or model[0] in "./~\\" or model.count("/") != 1:
        raise CheckpointError(
            f"There is no folder {model!r}. Give one that save_pretrained wrote, a .gguf file, or a name on the Hub "
            "such as 'Qwen/Qwen2.5-0.5B-Instruct'."
        )
    with training_libraries():
        from huggingface_hub import snapshot_download
    try:
        files = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(model, allow_patterns=files))
    except Exception as error:  # offline, gated, renamed: the hub's client has an error for each
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise CheckpointError(
            f"There is no folder {model!r} here, and the Hub gives none of that name{offline}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]} Check the name; where there is no network, "
            f"run `hf download {model} --local-dir FOLDER` elsewhere and give the folder."
        ) from error


def _in_run(source: Path, folder: Path) -> Path:
    """The model's folder; a GGUF file is converted once, into the run's own."""
    if source.suffix != ".gguf":
        return source
    made = folder / "model"
    if not made.exists():
        from metis_agent.gates.scorers.pretrained import quiet
        from metis_agent.models.checkpoint import convert_gguf

        with quiet():
            convert_gguf(source, made)
    return made


def _template(named: str | None) -> str | None:
    """The text of a chat template.

    Raises:
        ConfigurationError: there is no such file.
    """
    if named is None:
        return None
    place = CONFIGS / "chatml.jinja" if named == "chatml" else Path(named)
    if not place.is_file():
        raise ConfigurationError(f"--chat-template {named!r}: there is no such file; name one, or 'chatml'.")
    return place.read_text(encoding="utf-8")


# --- the stages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Stages:
    run: PolicyRun
    folder: Path
    tools: list[Any]
    verify: Verify
    console: Console

    def measure(
        self, model: Path, name: str, questions: Sequence[Question], template: str | None = None
    ) -> Measurement:
        """Free runs as the agent is deployed, and probes, which are sampled as in training."""
        from metis_agent.evaluation.agents import Probes, measure

        chat = self._chat(model, self.run.validation.temperature, template)
        probes = Probes(direct=self.run.validation.direct, tool=self.run.validation.tool)
        sampled = self._sampling(chat.model, chat.tokenizer, chat.processor, self.run.sampling.temperature)
        with self._counted(f"measure {_TITLES[name]}", len(questions) * (1 + len(probes.branches))) as count:
            return measure(
                self._rollouts(chat, name), questions, name=name, seed=self.run.training.seed, probes=probes,
                probe_rollouts=self._rollouts(sampled, name), verify=self.verify, progress=count,
            )  # fmt: skip

    def cold_start(
        self, model: Path, questions: Sequence[Question], samples: int, fine: SftSettings, template: str | None
    ) -> dict[str, Any]:
        """The first stage, in `folder/cold_start`; done where `cold_start.json` is there. Gives the `Lessons`' figures.

        Raises:
            InputError: too few runs are right.
        """
        note = self.folder / "cold_start.json"
        if not note.exists():
            kept = self._collect(model, questions, samples, template)
            write_json(note, {**kept.figures, **self._fine_tune(model, kept, fine, template)})
        found: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return {name: counts for name, counts in found.items() if isinstance(counts, dict)}

    def _collect(self, model: Path, questions: Sequence[Question], samples: int, template: str | None) -> Lessons:
        """Run the questions down each branch, and choose what the cold start is to learn."""
        from metis_agent.curation.strategy import choose_runs
        from metis_agent.models.chat_tokenizer import shows_tools
        from metis_agent.rollouts.runner import group_rollouts

        branches = [branch for branch in _BRANCHES for _ in range(samples)]
        plan = group_rollouts(questions, branches, name="curated", seed=self.run.training.seed)
        chat = self._chat(model, self.run.sampling.temperature, template)
        if not (chat.offers_tools_when_direct or shows_tools(chat.tokenizer)):
            self.console.print(
                "[bold yellow]The model's chat template shows no tools[/], so only the system prompt can tell it of "
                "them; see --chat-template.", highlight=False,
            )  # fmt: skip
        with self._counted("run down each branch", len(plan)) as count:
            runs = self._rollouts(chat, "curated").collect(plan, progress=count)
        longest = self.run.sampling.max_new_tokens
        kept = choose_runs(runs, self.verify, longest=longest, tokenizer=chat.tokenizer)
        _show_kept(self.console, kept)
        if kept.questions < _LEAST:
            raise InputError(
                f"{kept.questions} of {len(questions)} questions have a right run to learn from: of "
                f"{len(questions) * samples} runs down each branch {kept.figures['right']!r} are right. Give a "
                "system prompt that shows a call and asks for short answers (--system-prompt), a lower "
                "temperature (--set sampling.temperature=0.7), longer replies (--set sampling.max_new_tokens=...), a "
                "--chat-template that shows the tools, more --samples, easier questions, or a larger model."
            )
        return kept

    def _fine_tune(self, model: Path, kept: Lessons, fine: SftSettings, template: str | None) -> dict[str, Any]:
        """Learn from the kept runs; gives rows, tokens and losses."""
        from metis_agent.hdpo.cold_start import train_sft, write_sft_data
        from metis_agent.models.local import OFFERS_TOOLS_WHEN_DIRECT

        out = self.folder / "cold_start"
        loaded = self._load(model, template, device="cpu")  # the trainer moves it
        setattr(loaded.model.config, OFFERS_TOOLS_WHEN_DIRECT, True)  # as the direct runs are learnt
        data = write_sft_data(kept.runs, loaded.tokenizer, out / "data.arrow", max_length=fine.max_length)
        with progress_bars(self.console, width=34) as bars:
            shown = step_bar(bars, "fine-tune on the kept runs")
            log = train_sft(loaded.model, loaded.tokenizer, data, out, fine, callbacks=[shown])
        losses = [entry["loss"] for entry in log if "loss" in entry]
        return {"rows": data.rows, "tokens": data.tokens, "losses": losses}

    def hdpo(self, questions: Sequence[Question]) -> list[Mapping[str, float]]:
        """The second stage, in `folder/policy`; done where `hdpo.json` is there."""
        note = self.folder / "hdpo.json"
        if not note.exists():
            loaded = self._load(self.folder / "cold_start", None, device="cpu")
            history = train_run(self.run, loaded, self.folder, self.console, questions=questions)
            write_json(note, {"history": history})
        found: list[Mapping[str, float]] = json.loads(note.read_text(encoding="utf-8"))["history"]
        return found

    @contextmanager
    def _counted(self, title: str, total: int) -> Iterator[Callable[[Trajectory], None]]:
        """A bar that finished runs move; those that failed are told of at the end."""
        failures: list[str] = []
        with progress_bars(self.console, width=34) as bars:
            task = bars.add_task(title, total=total)

            def count(run: Trajectory) -> None:
                bars.advance(task)
                if run.status == "failed":
                    failures.append(run.error)

            yield count
        if failures:
            self.console.print(
                f"[bold yellow]{len(failures)} of {total} runs failed[/] and are left out, the first with "
                f"{escape(f'{failures[0]!r:.300}')}.", highlight=False,
            )  # fmt: skip

    def _load(self, model: Path, template: str | None, *, device: str) -> Any:
        import torch

        from metis_agent.models.checkpoint import load_checkpoint

        dtype: Any = self.run.model.dtype
        if dtype == "auto":
            dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return load_checkpoint(model, device=device, dtype=dtype, chat_template=template)

    def _chat(self, model: Path, temperature: float, template: str | None) -> Any:
        import torch

        loaded = self._load(model, template, device="cuda" if torch.cuda.is_available() else "cpu")
        return self._sampling(loaded.model, loaded.tokenizer, loaded.processor, temperature)

    def _sampling(self, model: Any, tokenizer: Any, processor: Any, temperature: float) -> Any:
        from metis_agent.models.local import LocalChatModel

        return LocalChatModel(
            model=model, tokenizer=tokenizer, processor=processor, model_name=self.run.model.path,
            temperature=temperature, max_new_tokens=self.run.sampling.max_new_tokens,
        )  # fmt: skip

    def _rollouts(self, chat: Any, name: str) -> Any:
        from metis_agent.cli.policy_run import agent_of_run
        from metis_agent.recording.store import TrajectoryStore
        from metis_agent.rollouts.runner import Rollouts

        sampling = self.run.sampling
        return Rollouts(
            agent_of_run(self.run, chat, self.tools), TrajectoryStore(self.folder / "trajectories" / name),
            concurrency=sampling.concurrency, timeout=sampling.timeout,
        )  # fmt: skip
