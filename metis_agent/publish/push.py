"""Publish a trained folder: copied with its model card, or pushed to a Hugging Face hub.

Only what belongs to it goes: of a gate the files that `gate.json` names, whose hashes are checked first; of a model
weights as safetensors, configuration and tokenizer. Never a pickle, never a checkpoint of the trainer.

The card has measured figures, data hash, promise, base model, licence and how to load it, read from the folder itself
(`gate.json` has most of it) and from figures that `metis evaluate --json` wrote. What is not known is said not to be
known. Every word that comes from elsewhere is made inert: what a tool's description says must not become a heading, a
link or a table's end.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metis_agent.errors import CheckpointError, ConfigurationError, InfrastructureError, MissingDependencyError
from metis_agent.gates.artefact import GATE_FILE, file_hash, is_number, load_artefact

__all__ = ["CardFacts", "Publication", "inert", "model_card", "number", "push_to_hub", "save_pretrained", "table"]

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_MOST_FIGURES = 80


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the folder does not say of itself.

    Raises:
        ConfigurationError: the licence or the base model is not written as a hub wants it.
    """

    license: str | None = None
    """An identifier such as "apache-2.0"."""
    base_model: str | None = None
    """`owner/name`; of a gate by default the model that it was trained from, where that is one."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Measured, such as `metis evaluate gate --json` writes them; of a gate by default those it was exported with."""
    measured_on: str = ""
    """In words, what the figures are of."""
    data: Sequence[Path] = ()
    """Files that it was trained on: the card has their SHA-256, the files stay here."""

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigurationError(
                f"license={self.license!r} is no licence identifier: write it as 'apache-2.0', 'mit' or 'other'."
            )
        if self.base_model is not None and not _REPO.fullmatch(self.base_model):
            raise ConfigurationError(f"base_model={self.base_model!r} is no name on a hub: write it as 'owner/name'.")


def model_card(folder: str | Path, *, repo: str = "owner/name", facts: CardFacts = CardFacts()) -> str:
    """The card of an artefact folder.

    Args:
        folder: A gate's, or a model's as `save_pretrained` writes it.
        repo: Where it will be, for the lines that load it.
        facts: What the folder does not say.

    Raises:
        CheckpointError: the folder is neither, or a gate that was changed.
        MissingDependencyError: huggingface_hub is not installed.
    """
    folder = Path(folder)
    if (folder / GATE_FILE).is_file():
        body, base, tags = _gate(folder, repo, facts)
    elif (folder / "config.json").is_file():
        body, base, tags = _policy(repo, facts), facts.base_model, ["reinforcement-learning"]
    else:
        raise CheckpointError(
            f"{str(folder)!r} has neither a {GATE_FILE} nor a config.json: it is no gate and no model. Give the folder "
            "that `metis train gate`, `metis train sft` or `metis train policy` wrote."
        )
    return f"---\n{_metadata(facts.license, base, tags)}\n---\n\n{body}"


def _metadata(license_: str | None, base: str | None, tags: Sequence[str]) -> str:
    try:
        from huggingface_hub import ModelCardData
    except ImportError as missing:
        raise MissingDependencyError(
            "A model card needs huggingface_hub; install it with: pip install huggingface_hub"
        ) from missing
    data = ModelCardData(
        license=license_, base_model=base, library_name="langgraph-metis", tags=["metis", "hdpo", "tool-use", *tags]
    )
    return str(data.to_yaml())


def _gate(folder: Path, repo: str, facts: CardFacts) -> tuple[str, str | None, list[str]]:
    artefact = load_artefact(folder)
    about = artefact.description
    trained_from = str(about["policy"].get("model") or "")
    # A path on the trainer's machine is nobody's business.
    known = trained_from if _REPO.fullmatch(trained_from) and not Path(trained_from).exists() else None
    base = facts.base_model or known
    # A folder that somebody else made may say anything there.
    training, measured = (it if isinstance(it, Mapping) else {} for it in map(about.get, ("training", "metrics")))
    figures = facts.figures or measured
    measured_on = facts.measured_on or ("" if facts.figures else "Held-out folds of the training records.")
    body = [
        f"# {inert(repo)}",
        "A gate for agents, trained by langgraph-metis: before the model answers it decides whether a tool is worth "
        f"calling, and which. Kind {inert(about['kind'])}, version {inert(about['version'])}.",
        "## What is promised",
        _promise(about["threshold"]),
        "## What was measured",
        _measured(figures, measured_on),
        "## Tools",
        table(["tool", "as described in training"], _tools(about["tools"])),
        "## Data",
        _data(facts.data, training.get("rows"), training.get("data_hash")),
        "## Use",
        "```py\nfrom metis_agent import PolicyGate, create_metis_agent\n\n"
        f'gate = PolicyGate.from_pretrained("{repo}", revision="...")  # a commit: it stays what it is\n'
        "agent = create_metis_agent(model, tools, gate=gate)\n```",
        "The agent's tools must be the ones above, and the figures hold for the chat model and the questions that were "
        "recorded: measure on your own with `metis evaluate gate`, and set the threshold anew with `metis calibrate`.",
    ]
    return _joined(body, base, facts.license), base, ["gate", str(about["kind"])]


def _policy(repo: str, facts: CardFacts) -> str:
    body = [
        f"# {inert(repo)}",
        "A chat model trained by HDPO (arXiv:2604.08545) with langgraph-metis to call a tool only where that helps.",
        "## What is promised",
        "Nothing: a policy has no threshold to set for a promise. A gate in front of it has.",
        "## What was measured",
        _measured(facts.figures, facts.measured_on),
        "## Data",
        _data(facts.data, None, None),
        "## Use",
        "```py\nfrom huggingface_hub import snapshot_download\n\nfrom metis_agent import create_metis_agent\n"
        "from metis_agent.models.local import LocalChatModel\n\n"
        f'model = LocalChatModel.load(snapshot_download("{repo}", revision="..."))\n'
        "agent = create_metis_agent(model, tools)\n```",
    ]
    return _joined(body, facts.base_model, facts.license)


def _joined(body: Sequence[str], base: str | None, license_: str | None) -> str:
    origin = [
        "## Origin",
        f"Base model: {inert(base) if base else 'none, or not on a hub'}. Licence: {inert(license_ or 'not stated')}.",
    ]
    return "\n\n".join([*body, *origin]) + "\n"


def _promise(threshold: Mapping[str, Any]) -> str:
    value = number(float(threshold["value"]))
    if "rows" not in threshold:
        return f"Nothing: the threshold, {value}, was not chosen for a promise ({inert(threshold.get('chosen', ''))})."
    return (
        f"Threshold {value}: {inert(threshold.get('chosen', ''))}. On those {number(threshold['rows'])} questions: a "
        f"tool on {number(threshold.get('tool_rate'))} of them, accuracy {number(threshold.get('accuracy'))}. It holds "
        "for the mean over questions like those."
    )


def _measured(figures: Mapping[str, Any], measured_on: str) -> str:
    if not figures:
        return "Nothing is known: no figures were given."
    said = [inert(measured_on)] if measured_on else []
    at, baselines = figures.get("at_threshold"), figures.get("baselines")
    if isinstance(at, Mapping) and isinstance(baselines, Mapping):
        heads = ["", "AUC", "accuracy at half of the calls", "accuracy", "calls a question"]
        rows = [_row("this gate", figures, at)]
        rows += [_row(str(name), row, row) for name, row in baselines.items() if isinstance(row, Mapping)]
        return "\n\n".join([*said, table(heads, rows)])
    rows = [[inert(name), shown] for name, value in _flat(figures) if (shown := number(value))]
    return "\n\n".join([*said, table(["figure", "value"], rows[:_MOST_FIGURES])])


def _row(name: str, ranked: Mapping[str, Any], placed: Mapping[str, Any]) -> list[str]:
    cells = [(ranked, "auc"), (ranked, "accuracy_at_half"), (placed, "accuracy"), (placed, "tool_rate")]
    return [inert(name), *(number(row.get(key), row.get(f"{key}_interval")) for row, key in cells)]


def _flat(figures: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        elif before or name != "format":
            yield before + str(name), value


def _tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for tool in tools:
        yield [inert(tool.get("name", "")), inert(tool.get("description", ""))]


def _data(files: Sequence[Path], rows: object, data_hash: object) -> str:
    said = [f"{number(rows)} recorded questions, SHA-256 {inert(data_hash)}."] if rows and data_hash else []
    if files:
        said.append(table(["file", "SHA-256"], [[inert(path.name), file_hash(path)] for path in files]))
    return "\n\n".join(said) or "Not stated."


_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&@:=-])")
_LONGEST = 500


def inert(text: object) -> str:
    """The text on one line, every character that Markdown or HTML gives a meaning escaped, cut to size."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    cut = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return _MEANS_SOMETHING.sub(r"\\\1", cut)


def number(value: object, interval: object = None) -> str:
    """A figure with its interval; empty for what is no finite number."""
    if not is_number(value):
        return ""
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    if isinstance(interval, Sequence) and len(interval) == 2 and all(map(is_number, interval)):
        shown += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return shown


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


CARD_FILE = "README.md"
_PARTS = (".json", ".safetensors", ".jinja", ".txt", ".model")
_NOT_OURS = ("training_args.json", "trainer_state.json", "optimizer.safetensors")


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What was published, or would be."""

    repo: str
    card: str
    files: tuple[Path, ...]
    """Besides the card."""
    left_out: tuple[str, ...]
    url: str = ""
    """Of the repository; empty after a dry run."""
    commit: str = ""
    """To load exactly this: `PolicyGate.from_pretrained(repo, revision=commit)`."""


def save_pretrained(folder: str | Path, target: str | Path, *, facts: CardFacts = CardFacts()) -> Path:
    """Copy a gate or a model with its model card to a new folder.

    Raises:
        CheckpointError: the folder is neither, or a gate that was changed.
        ConfigurationError: the target holds something.
    """
    folder, target = Path(folder), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"target={str(target)!r} holds something already; give a new folder.")
    files, _ = _parts(folder)
    card = model_card(folder, repo=target.name, facts=facts)
    target.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, target / path.name)
    (target / CARD_FILE).write_text(card, encoding="utf-8")
    return target


def push_to_hub(
    folder: str | Path,
    repo: str,
    *,
    facts: CardFacts = CardFacts(),
    private: bool = True,
    revision: str | None = None,
    message: str = "Add a model trained with langgraph-metis",
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Push a gate or a model with its model card, in one commit.

    Args:
        folder: What `metis train` wrote.
        repo: `owner/name`; made where it is not there.
        facts: For the card.
        private: Of a repository that is made; a gate has its tools' descriptions in it.
        revision: A branch; the main one by default.
        message: Of the commit.
        token: By default that of `hf auth login`, or the variable HF_TOKEN.
        dry_run: Send nothing.

    Raises:
        CheckpointError: the folder is neither, or a gate that was changed.
        ConfigurationError: `repo` is no name.
        InfrastructureError: the hub can't be reached, or refuses.
        MissingDependencyError: huggingface_hub is not installed.
    """
    files, left_out = _parts(Path(folder))
    hub = _hub()
    try:
        hub.utils.validate_repo_id(repo)
    except ValueError as error:
        raise ConfigurationError(
            f"repo={repo!r} is no name of a repository: {error} Write it as owner/name."
        ) from error
    card = model_card(folder, repo=repo, facts=facts)
    plan = Publication(repo=repo, card=card, files=files, left_out=left_out)
    if dry_run:
        return plan
    api = hub.HfApi(token=token)
    contents: dict[str, Any] = {CARD_FILE: card.encode(), **{path.name: path for path in files}}
    additions = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=part) for name, part in contents.items()]
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.create_commit(repo, additions, commit_message=message, revision=revision)
    except (hub.errors.HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        raise InfrastructureError(
            f"{repo!r} can't be pushed: {type(error).__name__}: {error} Log in with `hf auth login`, and check that "
            "the name is yours to write to."
        ) from error
    return Publication(repo=repo, card=card, files=files, left_out=left_out, url=str(made), commit=str(commit.oid))


def _parts(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(the files to publish, the names of those that stay here)."""
    if (folder / GATE_FILE).is_file():
        names = {GATE_FILE, *load_artefact(folder).description["files"]}
    elif (folder / "config.json").is_file():
        names = {path.name for path in folder.iterdir() if path.suffix in _PARTS and path.name not in _NOT_OURS}
        if not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(
                f"{str(folder)!r} has no safetensors: other weights can run code when they are loaded, and are not "
                "published. Save the model with save_pretrained."
            )
    else:
        names = set()
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    kept = tuple(path for path in found if path.name in names)
    return kept, tuple(path.name for path in found if path.name not in names and path.name != CARD_FILE)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as missing:
        raise MissingDependencyError(
            "Pushing needs huggingface_hub; install it with: pip install huggingface_hub"
        ) from missing
    return huggingface_hub
