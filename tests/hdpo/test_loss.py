from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.hdpo.loss import Normaliser, clipped_surrogate, hdpo_loss

from . import reference

# Logs of ratios, with old log-probabilities of 0.
HALF, ONE, TWICE = math.log(0.5), 0.0, math.log(2.0)


def surrogate(log_probs: list[list[float]], A: list[float], mask: list[list[int]], **options: Any) -> Any:
    ratios = torch.tensor(log_probs, dtype=torch.float64)
    return clipped_surrogate(
        ratios,
        torch.zeros_like(ratios),
        torch.tensor(A, dtype=torch.float64),
        torch.tensor(mask),
        **options,
    )


def random_batch(seed: int, B: int = 6, T: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones far enough off to be clipped, A_acc, A_tool (half zero) and a mask."""
    rng = np.random.default_rng(seed)
    old = torch.tensor(-rng.exponential(1.0, (B, T)))
    log_probs = (old + torch.tensor(rng.normal(0, 0.4, (B, T)))).requires_grad_()
    A_acc = torch.tensor(rng.normal(size=B))
    A_tool = torch.tensor(np.where(np.arange(B) % 2 == 0, rng.normal(size=B), 0.0))
    mask = torch.tensor(rng.random((B, T)) < 0.7)
    return log_probs, old, A_acc, A_tool, mask


# --- by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_ratio", "A", "loss", "clipped"),
    [
        # -min(ratio A, clip(ratio, 0.8, 1.2) A)
        (ONE, 1.0, -1.0, 0),
        (TWICE, 1.0, -1.2, 1),  # min(2, 1.2): no reward for going on upwards.
        (HALF, 1.0, -0.5, 0),  # min(0.5, 0.8): a good token that became unlikely still pulls.
        (TWICE, -1.0, 2.0, 0),  # min(-2, -1.2): a bad token that became likely pulls in full.
        (HALF, -1.0, 0.8, 1),  # min(-0.5, -0.8): no reward for going on downwards.
        (TWICE, 0.0, 0.0, 0),
    ],
)
def test_clip_by_hand(log_ratio: float, A: float, loss: float, clipped: int) -> None:
    result = surrogate([[log_ratio]], [A], [[1]])
    assert result.loss.item() == pytest.approx(loss)
    assert result.clip_fraction.item() == clipped


def test_each_side_has_its_own_clip() -> None:
    assert surrogate([[TWICE]], [1.0], [[1]], clip_high=0.5).loss.item() == pytest.approx(-1.5)
    assert surrogate([[HALF]], [-1.0], [[1]], clip_low=0.4).loss.item() == pytest.approx(0.6)


def test_normalisers_by_hand() -> None:
    # Ratio 1, so a token's loss is -A: sequence 1 has A = 2 and one token, sequence 2 A = -1 and three,
    # sequence 3 A = 0 and two. Sums -2, +3, 0.
    log_probs, A = [[0.0] * 3] * 3, [2.0, -1.0, 0.0]
    mask = [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    expected: dict[Normaliser, float] = {
        "grpo": (-2 / 1 + 3 / 3 + 0) / 3,
        "bnpo": (-2 + 3) / 6,
        "dapo": (-2 + 3) / 6,
        "active": (-2 + 3) / 4,
    }
    for name, loss in expected.items():
        assert surrogate(log_probs, A, mask, normaliser=name).loss.item() == pytest.approx(loss), name
    whole = surrogate(log_probs, A, mask, normaliser="dapo", total_tokens=torch.tensor(10))
    assert whole.loss.item() == pytest.approx(1 / 10)


def test_the_channels_are_clipped_apart_and_not_as_a_sum() -> None:
    # Ratio 2, A_acc = 1, A_tool = -1, both weights 1. Apart: -1.2 + 2 = 0.8, the tool channel still pulls.
    # Summed before the clip, A = 0 and nothing would.
    log_probs = torch.tensor([[TWICE]], requires_grad=True)
    result = hdpo_loss(
        log_probs, torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([-1.0]), torch.ones(1, 1), w_tool=1.0
    )
    assert result.loss.item() == pytest.approx(0.8)
    assert (result.acc.clip_fraction.item(), result.tool.clip_fraction.item()) == (1, 0)
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    assert gradient.item() == pytest.approx(2.0)  # d(2)/d(log ratio) = ratio * 1


def test_the_tool_channel_can_have_a_clip_of_its_own() -> None:
    # -1.2 for A_acc (clip 0.2), 0.15 * -1.5 for A_tool (clip 0.5).
    one = torch.tensor([1.0])
    log_probs = torch.tensor([[TWICE]])
    result = hdpo_loss(log_probs, torch.zeros(1, 1), one, one, torch.ones(1, 1), tool_clip=(0.5, 0.5))
    assert result.loss.item() == pytest.approx(-1.2 - 0.15 * 1.5)


# --- mistakes of the reference implementation ---------------------------------------------------------------


def tool_gradient(qualifying: int, normaliser: Normaliser | None) -> float:
    """Of 8 sequences of 5 tokens, the pull of the tool channel on one qualifying token."""
    log_probs = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
    A_tool = torch.tensor([1.0] * qualifying + [0.0] * (8 - qualifying), dtype=torch.float64)
    none = torch.zeros(8, dtype=torch.float64)
    result = hdpo_loss(
        log_probs,
        torch.zeros_like(log_probs),
        none,
        A_tool,
        torch.ones(8, 5),
        normaliser="bnpo",
        tool_normaliser=normaliser,
    )
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    return -gradient[0, 0].item()


def test_the_price_does_not_grow_as_fewer_qualify() -> None:
    """There: the mean over tokens with a non-zero A_tool, so the effective w_tool is w / (share active)."""
    assert tool_gradient(8, None) == pytest.approx(0.15 / 40)
    assert tool_gradient(2, None) == pytest.approx(0.15 / 40)
    # The option that reproduces it: a quarter qualifies, four times the price.
    assert tool_gradient(8, "active") == pytest.approx(0.15 / 40)
    assert tool_gradient(2, "active") == pytest.approx(4 * 0.15 / 40)


# --- against the NumPy reference, TRL and finite differences ------------------------------------------------


@pytest.mark.parametrize("normaliser", ["grpo", "bnpo", "dapo", "active"])
@pytest.mark.parametrize("seed", range(20))
def test_random_batches_equal_the_reference(normaliser: Normaliser, seed: int) -> None:
    log_probs, old, A_acc, A_tool, mask = random_batch(seed)
    result = hdpo_loss(
        log_probs,
        old,
        A_acc,
        A_tool,
        mask,
        w_acc=0.7,
        w_tool=0.3,
        clip=(0.2, 0.28),
        tool_clip=(0.1, 0.15),
        normaliser=normaliser,
    )
    table = log_probs.tolist(), old.tolist()
    acc = reference.surrogate(*table, A_acc.tolist(), mask.tolist(), low=0.2, high=0.28, normaliser=normaliser)
    tool = reference.surrogate(*table, A_tool.tolist(), mask.tolist(), low=0.1, high=0.15, normaliser=normaliser)
    assert result.acc.loss.item() == pytest.approx(acc, abs=1e-6)
    assert result.tool.loss.item() == pytest.approx(tool, abs=1e-6)
    assert result.loss.item() == pytest.approx(0.7 * acc + 0.3 * tool, abs=1e-6)
    assert 0 < result.acc.clip_fraction.item() < 1  # The batch does reach the clip.


@pytest.mark.parametrize("normaliser", ["grpo", "bnpo", "dapo", "active"])
def test_gradient_equals_finite_differences(normaliser: Normaliser) -> None:
    log_probs, old, A_acc, A_tool, mask = random_batch(7, B=3, T=4)

    def loss(values: Tensor) -> Tensor:
        return hdpo_loss(values, old, A_acc, A_tool, mask, normaliser=normaliser).loss

    assert torch.autograd.gradcheck(loss, (log_probs,))


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    # At ratio 1 the gradient by a token's log-probability is -A / (tokens of its sequence) / (sequences).
    log_probs = torch.full((2, 2), -1.0, requires_grad=True)
    A = torch.tensor([3.0, -1.0])
    result = clipped_surrogate(log_probs, log_probs, A, torch.tensor([[1, 1], [1, 0]]))
    (gradient,) = torch.autograd.grad(result.loss, log_probs)
    torch.testing.assert_close(gradient, torch.tensor([[-3 / 4, -3 / 4], [1 / 2, 0]]))


class _Alone:
    """The one-process accelerator that TRL's loss logs through."""

    num_processes = 1
    sync_gradients = True

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_conventions_are_those_of_trl(loss_type: Normaliser) -> None:
    """TRL 1.16's own `_compute_loss` on the same batch: same loss, same gradient, same clip fraction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    log_probs, old, A, _, mask = random_batch(11)
    B, T = mask.shape
    metrics: dict[str, list[float]] = {}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_probs, torch.zeros(B, T), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.28,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=_Alone(),
        _entropy_bonus_enabled=False,
        _metrics={"train": _Metrics(metrics)},
    )
    completion_mask = torch.ones(B, T, dtype=torch.long)
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": completion_mask,
        "tool_mask": mask.long(),
        "advantages": A,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = clipped_surrogate(
        log_probs,
        old,
        A,
        completion_mask * mask,
        clip_low=0.2,
        clip_high=0.28,
        normaliser=loss_type,
        total_tokens=mask.sum() if loss_type == "dapo" else None,
    )
    torch.testing.assert_close(ours.loss, theirs)
    assert ours.clip_fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])
    gradients = (torch.autograd.grad(loss, log_probs)[0] for loss in (ours.loss, theirs))
    torch.testing.assert_close(*gradients)


class _Metrics:
    """A dict of lists that are there when asked for, as the trainer's own."""

    def __init__(self, lists: dict[str, list[float]]) -> None:
        self._lists = lists

    def __getitem__(self, name: str) -> list[float]:
        return self._lists.setdefault(name, [])


# --- masks and shapes ---------------------------------------------------------------------------------------


def test_observation_tokens_have_no_effect_whatever_they_hold() -> None:
    log_probs, old, A_acc, A_tool, mask = random_batch(3)
    dirty, dirty_old = log_probs.detach().clone(), old.clone()
    dirty[~mask], dirty_old[~mask] = math.nan, -math.inf
    dirty.requires_grad_()
    for normaliser in ("grpo", "bnpo", "dapo", "active"):
        clean = hdpo_loss(log_probs, old, A_acc, A_tool, mask, normaliser=normaliser)
        result = hdpo_loss(dirty, dirty_old, A_acc, A_tool, mask, normaliser=normaliser)
        torch.testing.assert_close(result.loss, clean.loss)
        (gradient,) = torch.autograd.grad(result.loss, dirty)
        assert (gradient[~mask] == 0).all()
        assert gradient.isfinite().all()


def test_nothing_to_learn_from_is_zero() -> None:
    nothing = torch.zeros(2, 3)
    ones = torch.ones(2)
    for normaliser in ("grpo", "bnpo", "dapo", "active"):
        result = hdpo_loss(nothing, nothing, ones, ones, nothing, normaliser=normaliser, total_tokens=0)
        assert (result.loss.item(), result.acc.clip_fraction.item()) == (0, 0)


def test_advantages_may_differ_by_token() -> None:
    log_probs, old, A, _, mask = random_batch(5)
    by_token = clipped_surrogate(log_probs, old, A[:, None].expand_as(old), mask)
    torch.testing.assert_close(by_token.loss, clipped_surrogate(log_probs, old, A, mask).loss)


def test_no_gradient_reaches_the_old_policy() -> None:
    log_probs, old, A, _, mask = random_batch(6)
    old.requires_grad_()
    clipped_surrogate(log_probs, old, A, mask).loss.backward()
    assert old.grad is None


def test_at_weight_zero_the_tool_channel_is_gone() -> None:
    log_probs, old, A_acc, A_tool, mask = random_batch(8)
    result = hdpo_loss(log_probs, old, A_acc, A_tool, mask, w_tool=0.0)
    torch.testing.assert_close(result.loss, clipped_surrogate(log_probs, old, A_acc, mask).loss)


@pytest.mark.parametrize("clip", [(-0.1, 0.2), (1.1, 0.2), (0.2, -0.1), (math.nan, 0.2)])
def test_clips_that_cannot_be(clip: tuple[float, float]) -> None:
    with pytest.raises(ConfigurationError, match="clip_low"):
        surrogate([[0.0]], [1.0], [[1]], clip_low=clip[0], clip_high=clip[1])


def test_unknown_normaliser() -> None:
    with pytest.raises(ConfigurationError, match="normaliser='mean'"):
        surrogate([[0.0]], [1.0], [[1]], normaliser="mean")


def test_shapes_are_checked() -> None:
    two = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"\(3,\)"):
        clipped_surrogate(two, two, torch.zeros(3), two)
    with pytest.raises(InputError, match=r"\(2, 4\)"):
        clipped_surrogate(two, two, torch.zeros(2), torch.zeros(2, 4))


def test_a_correction_multiplies_each_tokens_loss() -> None:
    # On policy (ratio 1) a token's loss is -A times its correction: -(1 * 0.5 + 1 * 3) / 2 tokens; the last is masked.
    log_probs = torch.zeros(1, 3)
    found = clipped_surrogate(
        log_probs,
        log_probs,
        torch.ones(1),
        torch.tensor([[1, 1, 0]]),
        correction=torch.tensor([[0.5, 3.0, math.nan]]),
    )
    assert found.loss.item() == pytest.approx(-1.75)
