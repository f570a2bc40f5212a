"""Publish a trained folder: copied with its model card, or pushed to a Hugging Face hub.

Only what belongs to it goes: of a gate the files that `gate.json` names, whose hashes are checked first; of a model
weights as safetensors, configuration and tokenizer. Never a pickle, never a checkpoint of the trainer.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_agent.errors import CheckpointError, ConfigurationError, InfrastructureError, MissingDependencyError
from metis_agent.gates.artefact import GATE_FILE, load_artefact
from metis_agent.publish.card import CardFacts, model_card

__all__ = ["Publication", "push_to_hub", "save_pretrained"]

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
