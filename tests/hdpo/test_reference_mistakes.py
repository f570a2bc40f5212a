"""The mistakes of the published code, one test each, named after it; and its maths on ten thousand random groups."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from metis_agent.errors import JudgeUnavailableError
from metis_agent.hdpo.advantages import Objective, advantages
from metis_agent.hdpo.loss import hdpo_loss
from metis_agent.hdpo.rewards import Scores, score
from metis_agent.types import Question

from . import reference

QUESTION = Question(id="q", text="Is it?", answer="yes")


def test_mistake_qualifying_means_correct_and_not_correct_with_tools() -> None:
    """There: README, docstring and code each say another thing; a docstring wants tools to have been used."""
    group = reference.group(reference.trajectory(T=0), reference.trajectory(T=2), reference.trajectory("no", T=1))
    channels = advantages(Objective(), score([group]))
    assert channels.qualifying.tolist() == [[True, True, False]]
    assert channels.tool[0, 0] > 0 > channels.tool[0, 1]
    assert channels.tool[0, 2] == 0


def test_mistake_rounding_of_equal_tool_counts_taken_for_a_signal() -> None:
    """There: 1/3, 1/5 and 1/6 in float32 leave advantages of up to 0.056 that pass a `!= 0` mask."""
    for T in (2, 4, 5):
        group = reference.group(*[reference.trajectory(T=T) for _ in range(7)])
        channels = advantages(Objective(), score([group]))
        assert (channels.tool == 0).all()
        assert channels.rho.tolist() == [0]


def test_mistake_price_that_grows_as_fewer_qualify() -> None:
    """There: L_tool is a mean over its active tokens, so two qualifying of eight pay four times the price."""
    pulls = []
    for normaliser in (None, "active"):
        log_probs = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
        A_tool = torch.tensor([1.0, 1.0] + [0.0] * 6, dtype=torch.float64)
        result = hdpo_loss(
            log_probs, log_probs.detach(), torch.zeros(8, dtype=torch.float64), A_tool, torch.ones(8, 5),
            normaliser="bnpo", tool_normaliser=normaliser,  # type: ignore[arg-type]
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(result.loss, log_probs)
        pulls.append(-gradient[0, 0].item())
    assert pulls == pytest.approx([0.15 / 40, 4 * 0.15 / 40])


def test_mistake_failed_judge_scored_as_a_wrong_answer() -> None:
    """There: 0, and trained on as the model's error."""

    def judge(question: Question, answer: str) -> bool:
        if answer == "no":
            raise JudgeUnavailableError("503")
        return answer == "yes"

    group = reference.group(*[reference.trajectory(answer) for answer in ("yes", "wrong", "no")])
    scores = score([group], judge)
    assert scores.excluded.tolist() == [[False, False, True]]
    assert np.isnan(scores.r_acc[0, 2])
    assert dict(scores.exclusions) == {"judge unavailable": 1}
    without = advantages(Objective(), score([reference.group(*group.trajectories[:2])], judge))
    torch.testing.assert_close(advantages(Objective(), scores).acc[:, :2], without.acc)


def test_mistake_failed_tool_server_scored_as_a_wrong_answer() -> None:
    failed = reference.trajectory("", status="failed", error="SandboxGoneError: gone")
    scores = score([reference.group(reference.trajectory(), reference.trajectory("no"), failed)])
    assert scores.excluded.tolist() == [[False, False, True]]
    assert dict(scores.exclusions) == {"failed run": 1}
    assert advantages(Objective(), scores).acc[0, 2] == 0


def test_mistake_answer_read_from_the_first_match_anywhere_tool_output_included() -> None:
    """There: a tool that prints `<answer>yes</answer>` answers for the model. Here only its final message counts."""
    said = [{"type": "tool", "data": {"content": "<answer>yes</answer>"}}]
    scores = score([reference.group(reference.trajectory("no", T=1, messages=tuple(said)))])
    assert scores.r_ans.tolist() == [[0]]


def test_mistake_T_counts_invalid_calls_and_misses_the_last_turn() -> None:
    """Here T is what was executed, wherever in the run, from the trace; a failed call was executed."""
    runs = [
        reference.trajectory(statuses=["blocked", "repeated"]),
        reference.trajectory(statuses=["ok", "blocked", "error"]),
        reference.trajectory(statuses=["timeout"]),
    ]
    assert score([reference.group(*runs)]).T.tolist() == [[0, 2, 1]]


def test_ten_thousand_random_groups_have_the_advantages_and_the_loss_of_the_paper() -> None:
    """Against plain loops over the formulas, to 1e-6; ties, singletons, empty Q and NaN exclusions among them."""
    rng = np.random.default_rng(2604_08545)
    met: Counter[str] = Counter()
    total = 0
    while total < 10_000:
        P, G = 100, int(rng.integers(1, 9))
        right = rng.random((P, G)) < rng.random((P, 1))
        excluded = rng.random((P, G)) < rng.choice([0.0, 0.2, 0.9])
        formed = rng.random((P, G)) < 0.8
        T = rng.integers(0, rng.integers(1, 6), (P, G))
        nan = np.where(excluded, np.nan, 1.0)
        scores = Scores(r_ans=right * nan, r_fmt=formed * nan, T=T, cost=T.astype(float), excluded=excluded)
        r_acc = 0.9 * right + 0.1 * formed
        A_acc, A_tool = reference.grpo(r_acc, excluded), reference.tool_channel(T, right, excluded)
        ours = advantages(Objective(), scores)
        np.testing.assert_allclose(ours.acc.numpy(), A_acc, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(ours.tool.numpy(), A_tool, atol=1e-6, rtol=1e-6)
        Q = (right & ~excluded).sum(1)
        met.update({
            "empty Q": int((Q == 0).sum()), "singleton Q": int((Q == 1).sum()), "singleton": P * (G == 1),
            "excluded": int(excluded.sum()), "all excluded": int(excluded.all(1).sum()),
            "tie": int(((Q >= 2) & (np.abs(A_tool).max(1) == 0)).sum()),
            "signal": int((np.abs(A_tool).max(1) > 0).sum()),
        })  # fmt: skip
        _loss_is_that_of_the_paper(rng, A_acc, A_tool)
        total += P
    assert min(met.values()) > 200, met


def _loss_is_that_of_the_paper(rng: np.random.Generator, A_acc: np.ndarray, A_tool: np.ndarray) -> None:
    """Every group of the hundred, each rollout with three tokens, two of them its own."""
    for acc, tool in zip(A_acc, A_tool, strict=True):
        old = -rng.exponential(1.0, (len(acc), 3))
        log_probs = old + rng.normal(0, 0.3, old.shape)
        mask = np.tile([1, 0, 1], (len(acc), 1))
        result = hdpo_loss(
            *(torch.from_numpy(each) for each in (log_probs, old, acc, tool, mask)), normaliser="dapo"
        )  # fmt: skip
        parts = [
            reference.surrogate(log_probs, old, A, mask, low=0.2, high=0.2, normaliser="dapo") for A in (acc, tool)
        ]
        assert abs(result.loss.item() - (parts[0] + 0.15 * parts[1])) <= 1e-6
