"""SFT on curated trajectories: which tokens carry loss, and that the habit in the data is the habit that is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from metis_agent.curation.replay import ReplayStage
from metis_agent.curation.sft import AnswersStage, SoundStage, curate_sft
from metis_agent.errors import InputError
from metis_agent.hdpo.cold_start import IGNORED, sft_rows, train_sft, write_sft_data
from metis_agent.hdpo.settings import SftSettings
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.runner import Rollouts, group_rollouts
from metis_agent.types import Branch, ModelCall, Question, Trajectory
from metis_agent.worlds.almanac.agent import Noise, almanac_tools
from metis_agent.worlds.almanac.cold_start import build_model, build_tokenizer
from metis_agent.worlds.almanac.experiment import COLD_START, Experiment
from metis_agent.worlds.almanac.questions import questions
from tests.curation.runs import python, run

TOKENIZER = build_tokenizer()
LOOKED_UP = questions("train", 64, seed=1, kinds=("obscure",))
HELD_OUT = questions("test", 24, seed=2, kinds=("obscure",))


def roll_out(
    chat: LocalChatModel, asked: Sequence[Question], folder: Path, branch: Branch, noise: Noise
) -> list[Trajectory]:
    world = Experiment(folder=folder, noise=noise)
    rollouts = Rollouts(lambda gate: world.agent(chat, gate), TrajectoryStore(folder))
    return rollouts.collect(group_rollouts(asked, (branch,), name=branch, seed=0))


def teacher() -> LocalChatModel:
    return LocalChatModel.load(COLD_START, temperature=1.0, max_new_tokens=24)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's runs with noisy tools, and direct answers on the same questions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recorded")
    roll_out(teacher(), LOOKED_UP, folder / "tool", "free", Noise(wrong=0.25, error=0.1))
    roll_out(teacher(), LOOKED_UP, folder / "direct", "direct", Noise())
    return folder


@pytest.fixture(scope="module")
def curated(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "out"
    quiet = almanac_tools(noise=Noise(wrong=0.0, error=0.0))
    report = curate_sft(recorded / "tool", out, [SoundStage(), ReplayStage(quiet), AnswersStage()])
    assert report.rows == len(LOOKED_UP) == report.kept.total() + report.dropped
    replay = report.stages[1].dropped
    # The world spoils a quarter of the results and fails a tenth of the calls; each such run must go.
    assert replay["result does not match the record"] >= 5
    assert replay["recorded call failed"] >= 1
    return out / "kept"


# --- the mask ------------------------------------------------------------------------------------------------------


def test_only_what_the_model_wrote_carries_loss(curated: Path) -> None:
    runs = list(TrajectoryStore(curated, read_only=True).read())
    assert runs
    for trajectory in runs:
        (row,) = sft_rows(trajectory, TOKENIZER, source="recorded")
        learnt = TOKENIZER.decode([token for token in row.labels if token != IGNORED])
        written = "".join(TOKENIZER.decode(call.completion_ids) for call in trajectory.calls)
        assert learnt == written
        context = TOKENIZER.decode(
            [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
        )
        assert all(outcome.content in context for outcome in trajectory.outcomes)
        assert trajectory.question.text in context
        assert "<tool_call>" not in context
        assert "<answer>" not in context
        assert all(label in (token, IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_the_template_gives_the_tokens_that_were_recorded(curated: Path) -> None:
    for trajectory in TrajectoryStore(curated, read_only=True).read():
        assert sft_rows(trajectory, TOKENIZER, source="template") == sft_rows(trajectory, TOKENIZER, source="recorded")


def test_the_gradient_of_an_observation_token_is_nothing(curated: Path) -> None:
    """TRL's own batch: the loss does not change with what stands in observation labels, and only own tokens count."""
    (row,) = sft_rows(next(iter(TrajectoryStore(curated, read_only=True).read())), TOKENIZER)
    torch.manual_seed(0)
    model = build_model(len(TOKENIZER), end=TOKENIZER.eos_token_id, pad=TOKENIZER.pad_token_id).eval()
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    own = labels[0, 1:] != IGNORED
    by_hand = -log_probs[own, ids[0, 1:][own]].mean()
    assert int(own.sum()) == row.learnt
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, by_hand)


def test_trl_trains_on_exactly_these_labels(curated: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTTrainer

    from metis_agent.hdpo.cold_start import _arguments

    store = TrajectoryStore(curated, read_only=True)
    data = write_sft_data(store.read(), TOKENIZER, tmp_path / "data.arrow", max_length=None)
    trainer = SFTTrainer(
        model=student(), args=_arguments(tmp_path, SftSettings(batch=4)), processing_class=TOKENIZER,
        train_dataset=Dataset.from_file(str(data.path)),
    )  # fmt: skip
    expected = {row.input_ids: row.labels for it in store.read() for row in sft_rows(it, TOKENIZER)}
    seen = 0
    for batch in trainer.get_train_dataloader():
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert tuple(labels[:length].tolist()) == expected[tuple(ids[:length].tolist())]
            assert set(labels[length:].tolist()) <= {IGNORED}
            seen += 1
    assert seen == data.rows == data.trajectories
    assert data.learnt == sum(label != IGNORED for labels in expected.values() for label in labels)


# --- what is left out ----------------------------------------------------------------------------------------------


def test_foreign_ids_are_rendered_and_refused_where_ids_are_asked_for() -> None:
    foreign = run(python("6*7", "42"))
    foreign = replace(
        foreign, calls=tuple(replace(it, prompt_ids=(10**6,), completion_ids=(10**6,)) for it in foreign.calls)
    )
    (row,) = sft_rows(foreign, TOKENIZER)
    learnt = TOKENIZER.decode([token for token in row.labels if token != IGNORED])
    assert learnt == (
        '<tool_call>{"name": "python", "arguments": {"code": "6*7"}}</tool_call><|end|><answer>42</answer><|end|>'
    )
    with pytest.raises(InputError, match="vocabulary"):
        sft_rows(foreign, TOKENIZER, source="recorded")


def test_tampered_ids_are_noticed(curated: Path) -> None:
    trajectory = next(iter(TrajectoryStore(curated, read_only=True).read()))
    other = TOKENIZER("<answer>no</answer><|end|>", add_special_tokens=False)["input_ids"]
    calls = (*trajectory.calls[:-1], replace(trajectory.calls[-1], completion_ids=tuple(other)))
    with pytest.raises(InputError, match="decodes to"):
        sft_rows(replace(trajectory, calls=calls), TOKENIZER, source="recorded")


def test_a_split_run_trains_each_own_token_once(curated: Path) -> None:
    trajectory = next(iter(TrajectoryStore(curated, read_only=True).read()))
    first, second = trajectory.calls
    rewritten = replace(second, prompt_ids=(5, *(second.prompt_ids or ())))
    rows = sft_rows(replace(trajectory, calls=(first, rewritten)), TOKENIZER)
    (whole,) = sft_rows(trajectory, TOKENIZER)
    assert len(rows) == 2
    assert sum(row.learnt for row in rows) == whole.learnt


def test_what_cannot_be_learnt_is_counted_not_cut(curated: Path, tmp_path: Path) -> None:
    good = next(iter(TrajectoryStore(curated, read_only=True).read()))
    length = len(sft_rows(good, TOKENIZER)[0].input_ids)
    long = replace(good, calls=(replace(good.calls[0], prompt_ids=(5,) * 400), *good.calls[1:]))
    data = write_sft_data(
        [good, long, replace(good, status="failed")], TOKENIZER, tmp_path / "a.arrow", max_length=length
    )
    assert (data.trajectories, dict(data.excluded)) == (1, {f"longer than {length} tokens": 1, "failed run": 1})
    with pytest.raises(InputError, match="none of the trajectories"):
        write_sft_data([long], TOKENIZER, tmp_path / "b.arrow", max_length=length)


def test_a_template_that_rewrites_replies_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ messages|length }}{% endfor %}>"
    with pytest.raises(InputError, match="Mend the template"):
        sft_rows(run(python("6*7", "42")), tokenizer)


def test_records_without_calls_of_a_closed_model_are_rendered() -> None:
    closed = replace(run(python("6*7", "42")), calls=(ModelCall(node="act", step=0, text=""),))
    assert sft_rows(closed, TOKENIZER)[0].learnt > 5


# --- the habit -----------------------------------------------------------------------------------------------------


def student() -> Qwen3ForCausalLM:
    return LocalChatModel.load(COLD_START).model


def learn(
    model: Any, store: Path, folder: Path, *, steps: int, tokenizer: PreTrainedTokenizerFast = TOKENIZER
) -> list[Any]:
    data = write_sft_data(
        TrajectoryStore(store, read_only=True).read(), tokenizer, folder / "data.arrow", max_length=512
    )
    settings = SftSettings(max_steps=steps, batch=16, learning_rate=1e-3, warmup=0.1, checkpoint_every=1_000)
    return train_sft(model, tokenizer, data, folder, settings)


def tool_rate(folder: Path, record: Path) -> tuple[float, float]:
    """Share of held-out questions that are looked up, and share answered rightly."""
    chat = LocalChatModel.load(folder, temperature=0.0, max_new_tokens=24)
    runs = roll_out(chat, HELD_OUT, record, "free", Noise(wrong=0.0, error=0.0))
    right = sum(it.answer.casefold() == str(it.question.answer).casefold() for it in runs)
    return sum(it.tool_calls > 0 for it in runs) / len(runs), right / len(runs)


def test_the_habit_of_the_data_is_learnt(recorded: Path, curated: Path, tmp_path: Path) -> None:
    """A model that answers everything by heart learns, from curated runs alone, to look up what it can't know."""
    torch.manual_seed(0)
    learn(student(), recorded / "direct", tmp_path / "direct", steps=48)
    before, before_right = tool_rate(tmp_path / "direct", tmp_path / "r1")
    log = learn(LocalChatModel.load(tmp_path / "direct").model, curated, tmp_path / "taught", steps=20)
    after, after_right = tool_rate(tmp_path / "taught", tmp_path / "r2")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    print(f"tool rate {before} -> {after}, accuracy {before_right} -> {after_right}, loss {losses[0]} -> {losses[-1]}")
    assert before <= 0.1
    assert after >= 0.9
    assert after_right >= before_right + 0.5
    assert losses[-1] < losses[0] / 2
