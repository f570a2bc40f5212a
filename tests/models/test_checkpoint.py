import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from metis_agent.errors import CheckpointError
from metis_agent.models.checkpoint import load_checkpoint
from metis_agent.models.local import LocalChatModel


@pytest.fixture(scope="module")
def saved(policy: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_round_trip(saved: Path, policy: Any, tokenizer: Any) -> None:
    loaded = load_checkpoint(saved)
    assert not loaded.model.training
    assert torch.equal(loaded.model.model.embed_tokens.weight, policy.model.embed_tokens.weight)
    ours = LocalChatModel.load(saved, temperature=1.0, max_new_tokens=6)
    memory = LocalChatModel(model=policy, tokenizer=tokenizer, temperature=1.0, max_new_tokens=6)
    mine, theirs = (model.invoke("Hello", seed=3).response_metadata["token_record"] for model in (ours, memory))
    assert mine == theirs
    assert ours.model_name == str(saved)


def test_dtype(saved: Path) -> None:
    assert load_checkpoint(saved, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config["layer_types"] = ["full_attention"] * 3
    (folder / "config.json").write_text(json.dumps(config))


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))


def index_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "There is no folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gate"}'), "does not load as a causal"),
        (lambda f: (f / "model.safetensors").unlink(), r"lacks its weights \['model.safetensors'\]"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 1000), "not a whole safetensors file"),
        (truncate, "truncated or damaged"),
        (index_a_missing_shard, "model-00001-of-00002"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no readable weight_map"),
        (drop_a_layer, "tensors are missing"),
        (widen, "another shape"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "does not load"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_broken_folders_teach(folder: Path, damage: Any, says: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_code_in_the_folder_neither_runs_nor_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        pytest.fail("transformers asked whether the folder's code may run")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n\n\n"
        "class EvilConfig(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    for auto_map in ({"AutoConfig": "evil.EvilConfig"}, {"AutoTokenizer": [None, "evil.EvilConfig"]}):
        config = {"model_type": "evil", "auto_map": auto_map}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError):
            LocalChatModel.load(tmp_path)
    assert not ran.exists()
