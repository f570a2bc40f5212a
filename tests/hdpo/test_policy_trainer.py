"""The trainer against TRL's own update, and against the loss in `hdpo.loss`. Rollouts are real runs of the graph."""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from langchain_core.tools import tool
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from metis_agent.agent import create_metis_agent
from metis_agent.budget import Budget
from metis_agent.errors import ConfigurationError, SandboxGoneError
from metis_agent.hdpo.advantages import Objective
from metis_agent.hdpo.exploration import StratifiedGroups
from metis_agent.hdpo.loss import hdpo_loss
from metis_agent.hdpo.policy_trainer import HDPOTrainer
from metis_agent.hdpo.rewards import score
from metis_agent.hdpo.rollouts import Rollout, Rollouts, groups_of
from metis_agent.hdpo.segments import segments
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import Question, Trajectory
from metis_agent.worlds.almanac.cold_start import build_model
from metis_agent.worlds.almanac.experiment import COLD_START
from metis_agent.worlds.almanac.questions import questions
from metis_agent.worlds.almanac.tokens import build_tokenizer

TOKENIZER = build_tokenizer()
LESSONS = questions("train", 4, kinds=("sum",))
FREE = StratifiedGroups(size=4, direct=0, tool=0)
STRATIFIED = StratifiedGroups(size=4, direct=1, tool=1)


@tool
def python(code: str) -> str:
    """Give the code back."""
    return code[:8]


def fresh_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return build_model(len(TOKENIZER), end=TOKENIZER.eos_token_id, pad=TOKENIZER.pad_token_id)


def coin(question: Question, answer: str) -> bool:
    """A verdict that an untrained model's answers split on."""
    return zlib.crc32(answer.encode()) % 2 == 0


def arguments(folder: Path, groups: StratifiedGroups, **changed: object) -> GRPOConfig:
    settings: dict[str, object] = {
        "output_dir": str(folder), "num_generations": groups.size, "per_device_train_batch_size": 2 * groups.size,
        "steps_per_generation": 1, "max_steps": 2, "learning_rate": 0.05, "beta": 0.0, "loss_type": "dapo",
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "bf16": False, "activation_checkpointing": False, "shuffle_dataset": False, "temperature": 1.0,
        "max_completion_length": 64, "dataloader_pin_memory": False, "weight_decay": 0.0,
        "optim": "sgd",  # Adam would turn the rounding of a gradient near zero into a whole step
    }  # fmt: skip
    return GRPOConfig(**{**settings, **changed})  # type: ignore[arg-type]


class Noted(Rollouts):
    """Rollouts that remember what they returned, so that another trainer can be given the same."""

    def __init__(self, model: Qwen3ForCausalLM, folder: Path) -> None:
        chat = LocalChatModel(model=model, tokenizer=TOKENIZER, temperature=1.0, max_new_tokens=12)
        super().__init__(
            lambda gate: create_metis_agent(chat, [python], gate=gate, budget=Budget(calls=1)),
            TrajectoryStore(folder / "trajectories"),
        )
        self.batches: list[list[Trajectory]] = []

    def collect(self, rollouts: Sequence[Rollout], **options: object) -> list[Trajectory]:
        self.batches.append(super().collect(rollouts, **options))  # type: ignore[arg-type]
        return self.batches[-1]


def trained(
    folder: Path, objective: Objective, groups: StratifiedGroups, *, cold_start: bool = False
) -> tuple[HDPOTrainer, Noted]:
    model = LocalChatModel.load(COLD_START).model if cold_start else fresh_model()
    rollouts = Noted(model, folder)
    trainer = HDPOTrainer(
        model, TOKENIZER, arguments(folder, groups), questions=LESSONS, rollouts=rollouts, objective=objective,
        groups=groups, verify=coin,
    )  # fmt: skip
    trainer.train()
    return trainer, rollouts


def test_without_the_tool_channel_the_update_is_trls_own(tmp_path: Path) -> None:
    ours, noted = trained(tmp_path / "ours", Objective(w_tool=0.0), FREE)
    steps = iter(noted.batches)

    def same_rollouts(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[object]]:
        batch = next(steps)
        rows = [segments(run)[0] for run in batch]
        return {
            "prompt_ids": [list(row.prompt_ids) for row in rows],
            "completion_ids": [list(row.completion_ids) for row in rows],
            "logprobs": [list(row.log_probs) for row in rows],
            "env_mask": [list(row.mask) for row in rows],
            "reward": score(groups_of(batch, 4), coin).r_acc.flatten().tolist(),
        }

    theirs = GRPOTrainer(
        fresh_model(),
        [lambda completions, reward, **_: reward],
        args=arguments(tmp_path / "theirs", FREE),
        processing_class=TOKENIZER,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": it.text}]} for it in LESSONS]),
        rollout_func=same_rollouts,
    )
    theirs.train()
    start = fresh_model().state_dict()
    moved = max(float((weight - start[name]).abs().max()) for name, weight in ours.model.state_dict().items())
    assert moved > 1e-4  # or the comparison says nothing
    for name, weight in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_the_loss_is_that_of_hdpo_loss(tmp_path: Path) -> None:
    trainer, noted = trained(tmp_path, Objective(w_tool=0.5), FREE)
    batch = noted.batches[-1]
    A_acc, A_tool = torch.randn(2, len(batch), generator=torch.Generator().manual_seed(1))
    rows = [segments(run)[0] for run in batch]
    width = max(len(row.completion_ids) for row in rows)
    prompt_width = max(len(row.prompt_ids) for row in rows)
    pad = TOKENIZER.pad_token_id

    def padded(values: Sequence[Sequence[float]], fill: float, *, to: int, left: bool = False) -> torch.Tensor:
        return torch.tensor(
            [[fill] * (to - len(v)) + list(v) if left else list(v) + [fill] * (to - len(v)) for v in values]
        )

    inputs = {
        "prompt_ids": padded([row.prompt_ids for row in rows], pad, to=prompt_width, left=True),
        "prompt_mask": padded([[1] * len(row.prompt_ids) for row in rows], 0, to=prompt_width, left=True),
        "completion_ids": padded([row.completion_ids for row in rows], pad, to=width),
        "completion_mask": padded([[1] * len(row.completion_ids) for row in rows], 0, to=width),
        "tool_mask": padded([row.mask for row in rows], 1, to=width),
        "old_per_token_logps": padded([[lp - 0.3 for lp in row.log_probs] for row in rows], 0.0, to=width),
        "advantages": A_acc,
        "tool_advantages": A_tool,
    }
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    inputs["num_items_in_batch"] = mask.sum()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        width,
    )
    expected = hdpo_loss(
        log_probs, inputs["old_per_token_logps"], A_acc, A_tool, mask,
        w_tool=0.5, normaliser="dapo", total_tokens=mask.sum(),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_forced_rollouts_take_their_branch_and_only_their_decision_is_reweighted(tmp_path: Path) -> None:
    trainer, noted = trained(tmp_path, Objective(), STRATIFIED, cold_start=True)
    for run in noted.batches[-1]:
        if run.branch == "direct":
            assert run.tool_calls == 0
        if run.branch == "tool":
            assert run.calls[0].forced >= 1  # the opening of a call, and the name where there is one tool
    ids = torch.zeros(8, 5, dtype=torch.long)
    by_token = trainer._by_row(torch.arange(8.0).reshape(2, 4), ids)
    torch.testing.assert_close(by_token[:, 1:], torch.arange(8.0)[:, None].expand(8, 4))
    assert not torch.allclose(by_token[:, 0], torch.arange(8.0))


def test_metrics_are_logged_at_every_step(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, Objective(), STRATIFIED, cold_start=True)
    logged = [entry for entry in trainer.state.log_history if "hdpo/rho" in entry]
    assert len(logged) == 2
    assert all(math.isfinite(entry["hdpo/accuracy"]) and entry["hdpo/excluded"] == 0 for entry in logged)


def test_a_sandbox_that_dies_excludes_its_rollouts_and_is_not_scored(tmp_path: Path) -> None:
    """Reference mistake: a failed tool server was scored 0 and trained on as the model's error."""

    @tool("python")
    def dying(code: str) -> str:
        """Die."""
        raise SandboxGoneError("the sandbox is gone")

    model = LocalChatModel.load(COLD_START).model
    chat = LocalChatModel(model=model, tokenizer=TOKENIZER, temperature=1.0, max_new_tokens=24)
    store = TrajectoryStore(tmp_path / "trajectories")
    trainer = HDPOTrainer(
        model, TOKENIZER, arguments(tmp_path, STRATIFIED), questions=LESSONS, groups=STRATIFIED,
        rollouts=Rollouts(lambda gate: create_metis_agent(chat, [dying], gate=gate), store),
    )  # fmt: skip
    trainer.train()
    runs = list(store.read())
    failed = [run for run in runs if run.status == "failed"]
    assert failed
    assert all("SandboxGoneError" in run.error and not run.answer for run in failed)
    logged = [entry["hdpo/excluded"] for entry in trainer.state.log_history if "hdpo/excluded" in entry]
    assert sum(logged) == len(failed) < len(runs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 2}, "num_generations=2"),
        ({"loss_type": "cispo"}, "cispo"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    model = fresh_model()
    with pytest.raises(ConfigurationError, match=message):
        HDPOTrainer(
            model, TOKENIZER, arguments(tmp_path, FREE, **settings), questions=LESSONS, rollouts=Noted(model, tmp_path),
            groups=FREE,
        )  # fmt: skip


def test_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    model = fresh_model()
    with pytest.raises(ConfigurationError, match="distinct"):
        HDPOTrainer(
            model, TOKENIZER, arguments(tmp_path, FREE), questions=[*LESSONS, LESSONS[0]],
            rollouts=Noted(model, tmp_path), groups=FREE,
        )  # fmt: skip
