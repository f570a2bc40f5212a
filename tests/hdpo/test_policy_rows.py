"""From rollouts to rows of tokens: every segment is there, and a rollout that splits weighs what one weighs."""

from __future__ import annotations

import pytest
import torch

from metis_agent.hdpo.loss import Normaliser, clipped_surrogate
from metis_agent.hdpo.token_sequences import Row, Rows, rows_of, segments
from metis_agent.types import ModelCall, Question, Trajectory

QUESTION = Question(id="q", text="How much?", answer="3")


def run(*calls: tuple[tuple[int, ...], tuple[int, ...]], **fields: object) -> Trajectory:
    """A rollout from the (prompt, completion) of its model calls."""
    return Trajectory(
        id="run",
        question=QUESTION,
        calls=tuple(
            ModelCall(
                node="act", step=step, prompt_ids=prompt, completion_ids=completion, log_probs=(-1.0,) * len(completion)
            )
            for step, (prompt, completion) in enumerate(calls)
        ),
        **fields,  # type: ignore[arg-type]
    )


# Three tokens of a call, one observed, one token of an answer: as one segment, and with the prompt rewritten.
WHOLE = run(((1, 2), (7, 8, 9)), ((1, 2, 7, 8, 9, 3), (5,)))
SPLIT = run(((1, 2), (7, 8, 9)), ((4, 2, 7, 8, 9, 3), (5,)))
OTHER = run(((1, 2), (6, 6)))


def test_rows_hold_first_segments_in_order_then_the_others_then_blanks() -> None:
    found = rows_of([SPLIT, OTHER])
    assert (found.count, found.usable, dict(found.unusable)) == (3, 2, {})
    rows = found.laid_out(4, "dapo")
    assert [row.rollout for row in rows] == [0, 1, 0, -1]
    assert [row.segment.completion_ids for row in rows[:3]] == [(7, 8, 9), (6, 6), (5,)]
    assert rows[2].segment.prompt_ids == (4, 2, 7, 8, 9, 3)
    assert rows[3].weight == 0


def test_every_token_that_the_model_wrote_stands_in_one_row_only() -> None:
    written = {(0, token): 0 for token in (7, 8, 9, 5)}
    for row in rows_of([SPLIT]).laid_out(2, "dapo"):
        for token, own in zip(row.segment.completion_ids, row.segment.mask, strict=True):
            if own:
                written[row.rollout, token] += 1
    assert set(written.values()) == {1}


def pull(rows: list[Row], rollout: int, A: list[float], normaliser: Normaliser, total: int) -> float:
    """The summed gradient of the loss by the log-probabilities of one rollout's own tokens, at ratio 1."""
    width = max(len(row.segment.mask) for row in rows)
    mask = torch.tensor([[*row.segment.mask, *[0] * (width - len(row.segment.mask))] for row in rows])
    mask = mask * torch.tensor([[row.weight > 0] for row in rows])
    log_probs = torch.full(mask.shape, -1.0, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([A[max(row.rollout, 0)] * row.weight for row in rows], dtype=torch.float64)
    result = clipped_surrogate(
        log_probs, log_probs.detach(), advantages, mask, normaliser=normaliser, total_tokens=total
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return float(sum(gradient[place].sum() for place, row in enumerate(rows) if row.rollout == rollout))


@pytest.mark.parametrize("normaliser", ["dapo", "bnpo", "grpo"])
def test_a_rollout_that_splits_gets_no_more_gradient_than_one_that_does_not(normaliser: Normaliser) -> None:
    # A = 2 for the rollout with 3 + 1 tokens of its own, A = -1 for the other, which has 2: 6 tokens, 2 rollouts.
    # Over tokens ("dapo", "bnpo"): 4 tokens * -2 / 6 = -4/3, and 2 tokens * 1 / 6 = 1/3.
    # Over sequences ("grpo"): each of the 4 tokens -2 / 4 / 2, together -1, and the other 1 / 2, split or not.
    # Split, without weights, it would be -2 * (3/3 + 1/1) / 3 rows = -4/3 and 1/3: a third more than its due.
    expected = (-1.0, 0.5) if normaliser == "grpo" else (-4 / 3, 1 / 3)
    for first, total in ((WHOLE, 2), (SPLIT, 4)):
        rows = rows_of([first, OTHER]).laid_out(total, normaliser)
        found = tuple(pull(rows, rollout, [2.0, -1.0], normaliser, 6) for rollout in (0, 1))
        assert found == pytest.approx(expected), (normaliser, total)


def test_weights_by_hand() -> None:
    # Four rows for two rollouts: w = (3/4)(4/2), (2/2)(4/2), (1/4)(4/2).
    rows = rows_of([SPLIT, OTHER]).laid_out(4, "grpo")
    assert [row.weight for row in rows] == [1.5, 2.0, 0.5, 0.0]
    assert [row.weight for row in rows_of([SPLIT, OTHER]).laid_out(4, "dapo")] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("trajectory", "reason"),
    [
        (run(((1,), (2,)), status="failed", error="SandboxGoneError: gone"), "failed run"),
        (run((tuple(range(30)), (2, 3, 4))), "too long"),
        (
            Trajectory(
                id="run",
                question=QUESTION,
                calls=(ModelCall(node="act", step=0, prompt_ids=(1,), completion_ids=(2,), log_probs=(float("nan"),)),),
            ),
            "log-probability not finite",
        ),
    ],
)
def test_what_can_not_be_trained_on_keeps_its_place_and_is_named(trajectory: Trajectory, reason: str) -> None:
    found = rows_of([OTHER, trajectory, OTHER], max_length=32)
    assert dict(found.unusable) == {1: reason}
    rows = found.laid_out(4, "dapo")
    assert [row.weight for row in rows] == [1.0, 0.0, 1.0, 0.0]
    assert [row.rollout for row in rows] == [0, 1, 2, -1]


def test_a_rollout_with_one_segment_too_many_tokens_leaves_no_other_behind() -> None:
    long = run(((1,), (2,)), ((9,) * 40, (3,)))
    found = rows_of([long], max_length=32)
    assert (found.count, found.further, dict(found.unusable)) == (1, (), {0: "too long"})


def test_rows_are_rounded_up_to_whole_groups_and_micro_batches() -> None:
    assert [Rows(first=(None,) * n, further=(), unusable={}).padded_count(4) for n in (4, 5, 8)] == [4, 8, 8]


def test_what_was_not_sampled_is_not_corrected_for() -> None:
    """A forced token; a reply under a ban, where the engine tells no log-probability from before it."""

    def log_probs(**fields: object) -> list[float]:
        call = ModelCall(
            node="act", step=0, prompt_ids=(1,), completion_ids=(7, 8), log_probs=(-3.0, -1.0), **fields
        )  # type: ignore[arg-type]  # fmt: skip
        (found,) = segments(Trajectory(id="run", question=QUESTION, calls=(call,)))
        assert rows_of([Trajectory(id="run", question=QUESTION, calls=(call,))]).usable == 1
        return list(found.log_probs)

    nan = float("nan")
    assert log_probs() == [-3, -1]
    assert log_probs(forced=1) == pytest.approx([nan, -1], nan_ok=True)
    banned = {"tool_choice": "none"}
    assert log_probs(sampling=banned) == pytest.approx([nan, nan], nan_ok=True)
    assert log_probs(sampling=banned, allowed_log_probs=(-2.0, -1.0)) == [-3, -1]
