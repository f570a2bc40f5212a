"""Two processes under `accelerate launch` train as one does, and the shipped launch configurations are sound."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from metis_agent.cli.train_policy import CONFIGS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "DS_ACCELERATOR": "cpu",
    "TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip

NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def launched(folder: Path, processes: int, config: str = "cpu") -> dict[str, Any]:
    """Run `distributed_run` in one or two processes; the launch configuration is a shipped one, in float32."""
    folder.mkdir()
    settings = yaml.safe_load((CONFIGS / f"accelerate/{config}.yaml").read_text()) | {"mixed_precision": "no"}
    (folder / "launch.yaml").write_text(yaml.safe_dump(settings))
    script = [str(ROOT / "tests/hdpo/distributed_run.py"), str(folder)]
    command = [sys.executable, *script]
    if processes > 1:
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml"),
            "--num_processes", str(processes), "--main_process_port", "0", *script,
        ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "config",
    ["cpu", "fsdp", pytest.param("deepspeed", marks=NEEDS_DEEPSPEED)],
)
def test_two_processes_give_the_losses_of_one(tmp_path: Path, alone: dict[str, Any], config: str) -> None:
    """Rollouts split into segments here; "gdpo" normalises over the batch, so over both processes.

    With FSDP 2 each process holds half of every weight, and samples from a whole copy that follows the training; with
    ZeRO-3 too, and the weights are gathered to sample.
    """
    together = launched(tmp_path / config, 2, config)
    names = ("loss", "hdpo/rho", "hdpo/accuracy", "hdpo/tool_rate", "hdpo/excluded", "hdpo/split", "grad_norm")
    for objective in ("hdpo", "gdpo"):
        one, two = alone[objective], together[objective]
        assert (one["processes"], two["processes"]) == (1, 2)
        assert (one["sharded"], two["sharded"]) == (False, config != "cpu")
        assert len(one["history"]) == len(two["history"]) == 2
        for ours, theirs in zip(one["history"], two["history"], strict=True):
            for name in names:
                assert theirs[name] == pytest.approx(ours[name], abs=1e-4), (objective, name)
        assert one["history"][0]["hdpo/split"] > 0
        assert one["history"][0]["loss"] != 0
        assert two["weights"] == pytest.approx(one["weights"], abs=1e-4)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "cpu"])
def test_launch_configurations_are_read_by_accelerate_itself(name: str) -> None:
    """Unknown or ill-typed keys make accelerate refuse the file."""
    config = load_config_from_file(str(CONFIGS / f"accelerate/{name}.yaml"))
    assert config.num_processes == (2 if name == "cpu" else 8)
    if name == "fsdp":
        from accelerate import FullyShardedDataParallelPlugin

        given = {key.removeprefix("fsdp_"): value for key, value in config.fsdp_config.items()}
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=given.pop("version"),
            auto_wrap_policy=given.pop("auto_wrap_policy").lower(),
            reshard_after_forward=given.pop("reshard_after_forward"),
            cpu_ram_efficient_loading=given.pop("cpu_ram_efficient_loading"),
            state_dict_type=given.pop("state_dict_type"),
            cpu_offload=given.pop("offload_params"),
        )
        assert not given  # nothing that the plugin does not know
        assert plugin.fsdp_version == 2
    if name == "deepspeed":
        from accelerate.utils import DeepSpeedPlugin

        fields = set(DeepSpeedPlugin.__dataclass_fields__)
        assert {key for key in config.deepspeed_config if key not in fields} == {"zero3_save_16bit_model"} - fields
