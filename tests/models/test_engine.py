import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from metis_agent.errors import InfrastructureError
from metis_agent.models.completions import Completion, GenerationRequest
from metis_agent.models.decoding import RowSampling
from metis_agent.models.engine import Engine

from .teacher import teacher_forced


def requests(count: int, *, limit: int = 16, groups: int | None = None, **sampling: Any) -> list[GenerationRequest]:
    """Random prompts of different lengths; `groups` of them distinct."""
    shuffled = random.Random(7)
    prompts = [tuple(shuffled.choices(range(4, 100), k=shuffled.randint(1, 40))) for _ in range(groups or count)]
    return [
        GenerationRequest(
            prompt_ids=prompts[index % len(prompts)],
            max_new_tokens=limit,
            sampling=RowSampling(**{"temperature": 1.0, "seed": index, **sampling}),
        )
        for index in range(count)
    ]


def completed(engine: Engine, batch: Sequence[GenerationRequest]) -> list[Completion]:
    """Completions of a batch that nobody joins, in order."""
    found = {place: completion for part in engine.run(batch) for place, completion in part.items()}
    return [found[place] for place in range(len(batch))]


@pytest.fixture(scope="module")
def engine(policy: Any, tokenizer: Any) -> Engine:
    return Engine(policy, tokenizer)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("groups", [None, 5])
def test_log_probs_are_those_of_a_plain_forward_pass(
    engine: Engine, policy: Any, groups: int | None, temperature: float
) -> None:
    batch = requests(20, groups=groups, temperature=temperature)
    for request, completion in zip(batch, completed(engine, batch), strict=True):
        expected = teacher_forced(policy, request.prompt_ids, completion.ids, temperature)
        assert completion.log_probs == pytest.approx(expected, abs=1e-4)


def test_greedy_is_the_argmax_of_a_plain_forward_pass(engine: Engine, policy: Any) -> None:
    batch = requests(8, temperature=0.0)
    for request, completion in zip(batch, completed(engine, batch), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.ids]])
        with torch.no_grad():
            best = policy(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(dim=-1)
        assert completion.ids == best.tolist()
        assert completion.log_probs == pytest.approx(
            teacher_forced(policy, request.prompt_ids, completion.ids), abs=1e-4
        )


@pytest.mark.parametrize("groups", [None, 4])
def test_same_tokens_alone_and_in_a_batch_of_64(engine: Engine, groups: int | None) -> None:
    batch = requests(64, groups=groups)
    together = completed(engine, batch)
    for index in range(0, 64, 7):
        (alone,) = completed(engine, [batch[index]])
        assert alone.ids == together[index].ids
        assert alone.log_probs == pytest.approx(together[index].log_probs, abs=1e-4)


@pytest.fixture
def rows_run(policy: Any) -> Iterator[list[tuple[int, int]]]:
    """Shapes of what the model is run on."""
    shapes: list[tuple[int, int]] = []

    def note(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        shapes.append(tuple(keywords["input_ids"].shape))

    hook = policy.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    hook.remove()


def test_equal_prompts_are_run_once(engine: Engine, rows_run: list[tuple[int, int]]) -> None:
    batch = requests(24, groups=6)
    completed(engine, batch)
    assert rows_run[:2] == [(6, max(len(request.prompt_ids) for request in batch) - 1), (24, 1)]


def mixed() -> list[GenerationRequest]:
    """Rows of all kinds that end at 1 to 24 tokens."""
    sampled = [request for limit in (1, 3, 9, 24) for request in requests(7, limit=limit)]
    return [
        *sampled,
        *requests(3, limit=6, temperature=0.0),
        *requests(3, limit=12, temperature=0.7, top_k=5, banned=(9, 10)),
        *requests(3, limit=24, temperature=1.3, top_p=0.8, forced=(20, 21)),
    ]


def test_rows_that_have_ended_leave_the_batch(engine: Engine, rows_run: list[tuple[int, int]]) -> None:
    batch = mixed()
    completions = completed(engine, batch)
    steps = [rows for rows, width in rows_run if width == 1]
    assert len(steps) == max(len(completion.ids) for completion in completions) == 24
    assert steps[0] == len(batch)
    assert steps == sorted(steps, reverse=True)
    # A row stays for as long as a quarter of its batch has not ended.
    assert sum(steps) < sum(len(completion.ids) for completion in completions) / 0.75 + 2 * len(batch)


def test_leaving_rows_change_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = mixed()
    left = completed(engine, batch)
    monkeypatch.setattr(engine, "_by_row", False)
    stayed = completed(engine, batch)
    assert [(c.ids, c.finish) for c in left] == [(c.ids, c.finish) for c in stayed]
    for ours, theirs in zip(left, stayed, strict=True):
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_a_trainers_switches_on_the_live_model_change_nothing(policy: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(policy)
    model.activation_checkpointing_enable()
    model.config.use_cache = model.generation_config.use_cache = False
    model.train()
    batch = requests(12, groups=4)
    plain = completed(Engine(policy, tokenizer), batch)
    assert [c.ids for c in completed(Engine(model, tokenizer), batch)] == [c.ids for c in plain]


def test_every_row_has_its_own_limit(engine: Engine) -> None:
    batch = [request for limit in (1, 5, 9) for request in requests(6, limit=limit, banned=tuple(engine.eos_ids))]
    completions = completed(engine, batch)
    assert [len(completion.ids) for completion in completions] == [1] * 6 + [5] * 6 + [9] * 6
    assert {completion.finish for completion in completions} == {"length"}
    assert all(len(completion.log_probs) == len(completion.ids) for completion in completions)


def test_end_of_turn_is_kept_and_stops(engine: Engine, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    batch = [
        *requests(1, limit=5, forced=(7, 8, end, 9)),
        *requests(1, limit=3, forced=(7, 8, end)),
        *requests(1, limit=2, forced=(7, 8, end)),
    ]
    assert [(c.ids, c.finish) for c in completed(engine, batch)] == [
        ([7, 8, end], "stop"), ([7, 8, end], "stop"), ([7, 8], "length")
    ]  # fmt: skip


def test_stop_text_ends_its_row_with_the_token_that_completes_it(engine: Engine, tokenizer: Any) -> None:
    said = tuple(tokenizer("one. two")["input_ids"])
    common: dict[str, Any] = {
        "prompt_ids": (5, 6), "max_new_tokens": 8, "sampling": RowSampling(forced=said)
    }  # fmt: skip
    stopped, free = completed(engine, [GenerationRequest(**common, stop=("absent", ". ")), GenerationRequest(**common)])
    assert tokenizer.decode(stopped.ids) == "one. "
    assert stopped.finish == "stop"
    assert free.ids[: len(said)] == list(said[:8])


def test_a_checkpoints_own_generation_settings_change_nothing(policy: Any, tokenizer: Any) -> None:
    # Qwen checkpoints ship such a file; with its repetition penalty the record would not be the policy's.
    altered = copy.deepcopy(policy)
    altered.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=0.6, top_p=0.8, top_k=20, repetition_penalty=1.5, suppress_tokens=[9],
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    batch = requests(8)
    plain, other = completed(Engine(policy, tokenizer), batch), completed(Engine(altered, tokenizer), batch)
    assert [completion.ids for completion in other] == [completion.ids for completion in plain]


def test_every_end_token_of_the_checkpoint_counts(policy: Any, tokenizer: Any) -> None:
    altered = copy.deepcopy(policy)
    altered.generation_config.eos_token_id = [8, 9]
    engine = Engine(altered, tokenizer)
    assert engine.eos_ids == {8, 9, tokenizer.eos_token_id}
    (completion,) = completed(engine, requests(1, forced=(20, 9, 21)))
    assert completion.ids == [20, 9]


def test_training_mode_is_put_back_and_dropout_is_off(policy: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(policy)
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    batch = requests(4)
    assert [c.ids for c in completed(Engine(model, tokenizer), batch)] == [
        c.ids for c in completed(Engine(policy, tokenizer), batch)
    ]
    assert model.training


@pytest.mark.parametrize("by_row", [True, False])
def test_training_mode_is_back_before_the_last_completion_is_given(
    policy: Any, tokenizer: Any, by_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who waits for it may be a trainer, whose forward pass comes next.
    model = copy.deepcopy(policy).train()
    engine = Engine(model, tokenizer)
    monkeypatch.setattr(engine, "_by_row", by_row)
    batch = [request for limit in (2, 5) for request in requests(1, limit=limit, banned=tuple(engine.eos_ids))]
    modes = [model.training for _ in engine.run(batch)]
    assert modes == ([False, True] if by_row else [True])


def test_new_weights_are_used_at_once(policy: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(policy)
    engine = Engine(model, tokenizer)
    batch = requests(4)
    before = [completion.ids for completion in completed(engine, batch)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    after = completed(engine, batch)
    assert [completion.ids for completion in after] != before
    assert after[0].log_probs == pytest.approx(teacher_forced(model, batch[0].prompt_ids, after[0].ids), abs=1e-4)


def test_diverged_weights_are_an_infrastructure_failure(policy: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(policy)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(InfrastructureError, match="NaN"):
        completed(Engine(model, tokenizer), requests(2))


def test_interruption_ends_a_running_batch(policy: Any, tokenizer: Any) -> None:
    asked = iter([False, False, True])
    engine = Engine(policy, tokenizer, interrupted=lambda: next(asked))
    (completion,) = completed(engine, requests(1, limit=500, banned=tuple(Engine(policy, tokenizer).eos_ids)))
    assert len(completion.ids) == 3


def test_completions_are_given_as_they_end(engine: Engine) -> None:
    batch = [request for limit in (9, 2, 5) for request in requests(1, limit=limit, banned=tuple(engine.eos_ids))]
    assert [list(part) for part in engine.run(batch)] == [[1], [2], [0]]


@pytest.mark.parametrize("at_once", [1, 7])
def test_requests_that_join_are_completed_as_they_would_be_alone(engine: Engine, at_once: int) -> None:
    every = mixed()
    waiting = every[12:]

    def joining(running: int) -> list[GenerationRequest]:
        room = at_once if running < 20 else 0
        joined, waiting[:room] = waiting[:room], []
        return joined

    parts = list(engine.run(every[:12], joining))
    assert len(parts) > 5
    found = {place: completion for part in parts for place, completion in part.items()}
    assert sorted(found) == list(range(len(every)))
    for place, request in enumerate(every):
        (alone,) = completed(engine, [request])
        assert (found[place].ids, found[place].finish) == (alone.ids, alone.finish)
        assert found[place].log_probs == pytest.approx(alone.log_probs, abs=1e-4)
        assert found[place].allowed_log_probs == pytest.approx(alone.allowed_log_probs, abs=1e-4)


def test_a_batch_that_has_ended_goes_on_with_those_who_join(engine: Engine) -> None:
    later = iter([requests(1, limit=1), requests(2, limit=3), ()])
    found = [place for part in engine.run(requests(1, limit=1), lambda running: next(later, ())) for place in part]
    assert sorted(found) == [0, 1, 2, 3]


def test_a_stop_text_of_one_who_joined_is_met(engine: Engine, tokenizer: Any) -> None:
    said = tuple(tokenizer("one. two")["input_ids"])
    stopped = GenerationRequest(
        prompt_ids=(5, 6), max_new_tokens=8, sampling=RowSampling(forced=said), stop=(". ",)
    )  # fmt: skip
    later = iter([(), (stopped,)])
    plain = requests(1, limit=6, banned=tuple(engine.eos_ids))
    found = {place: it for part in engine.run(plain, lambda running: next(later, ())) for place, it in part.items()}
    assert tokenizer.decode(found[1].ids) == "one. "
    assert (found[1].finish, len(found[0].ids)) == ("stop", 6)
