import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from metis_agent.errors import CheckpointError, MetisError
from metis_agent.models.checkpoint import load_checkpoint, save_checkpoint
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


def test_what_is_saved_is_there_when_all_of_it_is(policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    class Killed:
        def save_pretrained(self, folder: Path) -> None:
            tokenizer.save_pretrained(folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(policy, Killed(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_checkpoint(policy, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    load_checkpoint(tmp_path / "model")


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


EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        "AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"}  # fmt: skip
"""What a folder may name in its `auto_map`; `evil.py` beside it leaves a mark."""


def changed(file: str, **fields: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, **fields}))

    return change


def pickled(folder: Path) -> None:
    """Weights that run code when they are unpickled, in place of the safetensors file and beside it."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(f"cbuiltins\nexec\n(Vexec(open({str(folder / 'evil.py')!r}).read())\ntR.".encode())


def only_pickled(folder: Path) -> None:
    pickled(folder)
    (folder / "model.safetensors").unlink()


def generates_its_own_way(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")


@pytest.mark.parametrize(
    "change",
    [
        changed("config.json", model_type="evil", auto_map=EVIL),
        changed("config.json", auto_map=EVIL),
        changed("config.json", auto_map={name: f"somebody/else--{value}" for name, value in EVIL.items()}),
        changed("config.json", architectures=["evil.Evil"], model_type="../evil"),
        changed("config.json", custom_pipelines={"text-generation": {"impl": "evil.Evil", "pt": ["Evil"]}}),
        changed("config.json", quantization_config={"quant_method": "evil", "auto_map": EVIL}),
        changed("tokenizer_config.json", auto_map=EVIL),
        changed("tokenizer_config.json", tokenizer_class="evil.Evil", auto_map=EVIL),
        changed("processor_config.json", processor_class="evil.Evil", auto_map=EVIL),
        changed("preprocessor_config.json", image_processor_type="evil.Evil", auto_map=EVIL),
        changed("generation_config.json", custom_generate="."),
        changed("adapter_config.json", peft_type="LORA", base_model_name_or_path="evil", auto_mapping=EVIL),
        generates_its_own_way,
        pickled,
        only_pickled,
        lambda folder: (folder / "chat_template.jinja").write_text(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ran') }}"
        ),
    ],
)  # fmt: skip
def test_code_in_the_folder_neither_runs_nor_is_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    def asked(*_: object) -> str:
        pytest.fail("transformers asked whether the folder's code may run")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.chdir(folder)
    (folder / "evil.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import PretrainedConfig\n\n\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    change(folder)
    with contextlib.suppress(MetisError):  # it loads as what it is without the code, or not at all
        LocalChatModel.load(folder, max_new_tokens=2).invoke("Hello")
    assert not (folder / "ran").exists()
    assert "evil" not in sys.modules
