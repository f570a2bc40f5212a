"""Pushing and fetching with huggingface_hub's own client, against a small hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub.utils import disable_progress_bars
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import CheckpointError, ConfigurationError, InfrastructureError, MetisError
from metis_agent.gates.policy import PolicyGate
from metis_agent.publish import CardFacts, push_to_hub, save_pretrained
from tests.publish.hub import Hub, running
from tests.publish.trained import train

pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    # huggingface_hub 2.4 uploads in a way that its HTTP library would rather have otherwise.
    pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "my-gate"
    return train(folder, metrics={"auc": 0.9}, description="Looks things up.")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """What HF_ENDPOINT, HF_HOME and HF_TOKEN set, which the client reads when it is imported."""
    with running() as made:
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {
            "ENDPOINT": made.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
        }  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", made.token)
        disable_progress_bars()
        yield made


def push(gate: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["push", str(gate), *arguments])
    if isinstance(result.exception, MetisError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_gate_is_pushed_and_loaded_back(gate: Path, hub: Hub) -> None:
    said = push(gate, "--repo", "me/my-gate", "--license", "apache-2.0")
    repo = hub.repos["me/my-gate"]
    commit = repo.branches["main"]
    assert commit in said
    files = repo.commits[commit]
    assert set(files) == {"README.md", "gate.json", "gate.safetensors"}
    assert repo.private
    assert any(path.startswith("/lfs/") for path in hub.seen)
    assert files["gate.json"] == (gate / "gate.json").read_bytes()
    assert b"license: apache-2.0" in files["README.md"]
    here = PolicyGate(gate)
    for revision in (None, commit):
        there = PolicyGate.from_pretrained("me/my-gate", revision=revision, threshold=0.25)
        assert there.artefact.folder.name == commit
        assert there.score("Who won the 7 cup?") == here.score("Who won the 7 cup?")
        assert there.threshold == 0.25
        assert not (there.artefact.folder / "README.md").exists()  # what the gate does not need is not fetched


def test_a_branch_and_a_second_push(gate: Path, hub: Hub) -> None:
    push(gate, "--repo", "me/g", "--public")
    first = hub.repos["me/g"].branches["main"]
    push(gate, "--repo", "me/g", "--revision", "next", "--license", "mit")
    repo = hub.repos["me/g"]
    assert (repo.private, repo.branches["main"], repo.branches["next"] != first) == (False, first, True)
    assert b"license: mit" in repo.commits[repo.branches["next"]]["README.md"]


def test_what_goes_wrong_is_said(gate: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="'me/absent' can't be fetched"):
        PolicyGate.from_pretrained("me/absent")
    with pytest.raises(ConfigurationError, match="owner/name"):
        PolicyGate.from_pretrained("no such/name/at all")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InfrastructureError, match="hf auth login"):
        push(gate, "--repo", "me/g")


def test_a_gate_that_was_changed_on_the_hub_does_not_load(gate: Path, hub: Hub) -> None:
    push(gate, "--repo", "me/g")
    repo = hub.repos["me/g"]
    good = repo.commits[repo.branches["main"]]
    described = json.loads(good["gate.json"])
    described["files"]["../../evil.json"] = "0" * 64
    repo.commits["1" * 40] = {**good, "gate.json": json.dumps(described).encode()}
    repo.commits["2" * 40] = {**good, "gate.safetensors": good["gate.safetensors"][:-1] + b"\x01"}
    with pytest.raises(CheckpointError, match="no plain file names"):
        PolicyGate.from_pretrained("me/g", revision="1" * 40)
    with pytest.raises(CheckpointError, match="SHA-256"):
        PolicyGate.from_pretrained("me/g", revision="2" * 40)


def test_a_dry_run_sends_nothing(gate: Path, hub: Hub) -> None:
    said = push(gate, "--repo", "me/g", "--dry-run")
    assert "# me/g" in said
    assert "gate.safetensors" in said
    assert hub.seen == []


def test_saved_with_its_card_it_loads_from_the_folder(gate: Path, tmp_path: Path) -> None:
    target = save_pretrained(gate, tmp_path / "out", facts=CardFacts(license="mit"))
    assert {path.name for path in target.iterdir()} == {"README.md", "gate.json", "gate.safetensors"}
    saved = PolicyGate.from_pretrained(target, threshold=0.3)
    assert (saved.threshold, saved.artefact.tools) == (0.3, ("search",))
    with pytest.raises(ConfigurationError, match="holds something"):
        save_pretrained(gate, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="leave it out"):
        PolicyGate.from_pretrained(target, revision="main")


def test_of_a_model_only_what_can_run_no_code_is_published(tmp_path: Path) -> None:
    model = tmp_path / "policy"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        (model / name).write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pkl", "trainer_state.json", "run.py"):
        (model / name).write_text("x")
    plan = push_to_hub(model, "me/policy", dry_run=True)
    names = {path.name for path in plan.files}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert set(plan.left_out) == {
        "training_args.bin", "optimizer.pt", "scheduler.pkl", "trainer_state.json", "run.py"
    }  # fmt: skip
    assert "LocalChatModel.load" in plan.card
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        push_to_hub(model, "me/policy", dry_run=True)
    shutil.rmtree(model)
    with pytest.raises(CheckpointError, match="no gate and no model"):
        push_to_hub(model, "me/policy", dry_run=True)
    with pytest.raises(ConfigurationError, match="owner/name"):
        push_to_hub(model, "not a name", dry_run=True)
