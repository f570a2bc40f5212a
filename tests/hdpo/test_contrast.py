"""The decision contrast against a transcription of its formulas in NumPy, and what it promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError
from metis_agent.hdpo.advantages import Objective, advantages
from metis_agent.hdpo.contrast import by_token, contrasts, decision_loss, openings
from metis_agent.hdpo.exploration import StratifiedGroups, balance_weights, cut, later_decisions
from metis_agent.hdpo.rewards import Scores
from metis_agent.hdpo.token_sequences import segments
from metis_agent.types import ModelCall, Trajectory

from .policy_world import STRATIFIED, arguments, cold_start, furthest, logged, rollouts_of, trainer_of
from .reference import trajectory

CONTRAST = Objective(name="contrast", price=0.3)
OPENING = (7, 8)


def random_scores(P: int, G: int, seed: int = 0) -> tuple[Scores, np.ndarray, np.ndarray]:
    """Groups with ties, missing branches, malformed calls, exclusions and several calls a run."""
    rng = np.random.default_rng(seed)
    calls = rng.choice([0, 1, 2, 3], (P, G), p=[0.4, 0.4, 0.15, 0.05]) * (rng.random((P, 1)) < 0.9)
    right = (rng.random((P, G)) < rng.choice([0, 0.3, 0.9, 1], (P, 1))).astype(float)
    scores = Scores(
        r_ans=right,
        r_fmt=(rng.random((P, G)) < 0.9).astype(float),
        T=calls,
        cost=calls * rng.choice([1.0, 0.5], (P, 1)),
        excluded=rng.random((P, G)) < rng.choice([0, 0.1, 1], (P, 1), p=[0.7, 0.25, 0.05]),
    )
    return scores, (calls > 0) | (rng.random((P, G)) < 0.05), rng.random(P) < 0.9


def transcribed(scores: Scores, called: np.ndarray, apart: np.ndarray, w: float) -> tuple[np.ndarray, np.ndarray]:
    """Delta and A by the formulas: means with NaN where something does not count."""
    out = scores.excluded
    r, fmt = np.where(out, np.nan, scores.r_ans), np.where(out, np.nan, scores.r_fmt)
    e = r / (1 + scores.cost)
    branch = {b: np.where(called == b, 1.0, np.nan) for b in (False, True)}

    def mean(values: np.ndarray) -> np.ndarray:
        n = (~np.isnan(values)).sum(1)
        return np.where(n > 0, np.nansum(values, 1) / np.maximum(n, 1), np.nan)

    r_T, r_D, e_T, e_D = (mean(x * branch[b]) for x in (r, e) for b in (True, False))
    Delta = np.where(apart, np.nan_to_num((r_T - r_D) + w * (e_T - e_D)), 0)
    C = 0.9 * r + 0.1 * fmt + w * e
    n = (~out).sum(1)
    std = np.sqrt(np.nansum((C - mean(C)[:, None]) ** 2, 1) / np.maximum(n - 1, 1))
    baseline = np.where(called, mean(C * branch[True])[:, None], mean(C * branch[False])[:, None])
    baseline = np.where(apart[:, None], baseline, mean(C)[:, None])
    return Delta, np.nan_to_num((C - baseline) / (std[:, None] + 1e-4))


def test_ten_thousand_random_groups_equal_the_transcription() -> None:
    scores, called, apart = random_scores(10_000, 8)
    found = advantages(CONTRAST, scores, called=called, apart=apart)
    Delta, A = transcribed(scores, called, apart, w=0.3)
    np.testing.assert_allclose(found.contrast, Delta, atol=1e-6)
    np.testing.assert_allclose(found.acc, A, atol=1e-6)
    assert not found.tool.any()


def test_a_group_worked_by_hand() -> None:
    # Two direct, one right; two calls, both right. r_T - r_D = 1 - 1/2; e_D = 1/2, e_T = 1/2, so Delta = 1/2.
    scores = Scores(
        r_ans=np.array([[1.0, 0, 1, 1]]), r_fmt=np.ones((1, 4)), T=np.array([[0, 0, 1, 1]]),
        cost=np.array([[0.0, 0, 1, 1]]), excluded=np.zeros((1, 4), dtype=bool),
    )  # fmt: skip
    found = advantages(Objective(name="contrast", price=0.5), scores)
    assert found.contrast.tolist() == pytest.approx([0.5])
    # C = .9 r + .1 + w e = 1.5, .1, 1.25, 1.25; the direct branch's mean .8, std of all four .6278.
    assert found.acc[0].tolist() == pytest.approx([0.7 / 0.6279, -0.7 / 0.6279, 0, 0], abs=1e-3)


@pytest.mark.parametrize(("r_D", "r_T", "Delta"), [(1, 1, -0.25), (0, 1, 1.25), (0, 0, 0), (1, 0, -1.5)])
def test_what_a_call_is_worth(r_D: float, r_T: float, Delta: float) -> None:
    """Where both branches are right it costs half the price; where only one is, that decides."""
    scores = Scores(
        r_ans=np.array([[r_D, r_T]]), r_fmt=np.ones((1, 2)), T=np.array([[0, 1]]), cost=np.array([[0.0, 1.0]]),
        excluded=np.zeros((1, 2), dtype=bool),
    )  # fmt: skip
    assert advantages(Objective(name="contrast", price=0.5), scores).contrast.tolist() == pytest.approx([Delta])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_content_never_rewards_or_blames_the_choice_of_a_branch(seed: int) -> None:
    """With the weights of the branches, what both branches' contents say of the decision sums to nothing."""
    scores, called, apart = random_scores(4, 8, seed)
    A = advantages(CONTRAST, scores, called=called, apart=apart).acc.double().numpy()
    v = balance_weights(called, np.full(4, 0.3), StratifiedGroups(size=8, direct=2, tool=2))
    for branch in (called, ~called):
        np.testing.assert_allclose((v * A * branch).sum(1)[apart], 0, atol=1e-4)


def test_the_decisions_loss_is_a_hinge_on_the_log_odds() -> None:
    z = torch.tensor([-9.0, 0.0, 3.0, 5.0, 9.0], requires_grad=True)
    for Delta, pull in ((0.5, [-0.5, -0.5, -0.5, 0, 0]), (-0.25, [0, 0.25, 0.25, 0.25, 0.25]), (0.0, [0] * 5)):
        each = decision_loss(torch.nn.functional.logsigmoid(z), torch.full((5,), Delta), margin=4.0)
        hinge = np.abs(Delta) * np.maximum(0, 4 - np.sign(Delta) * z.detach().numpy())
        np.testing.assert_allclose(each.detach(), hinge, rtol=1e-3, atol=1e-6)
        (gradient,) = torch.autograd.grad(each.sum(), z)
        np.testing.assert_allclose(gradient, pull, rtol=1e-2, atol=1e-6)


def rollout(*calls: tuple[tuple[int, ...], tuple[int, ...]], forced: int = 0, choice: str = "auto") -> Trajectory:
    """A rollout by the prompts and completions of its replies."""
    made = [
        ModelCall(
            node="act", step=step, prompt_ids=prompt, completion_ids=written, log_probs=(-1.0,) * len(written),
            tool_calls=({"name": "python"},) if written[:2] == OPENING else (), forced=forced if step == 0 else 0,
            sampling={"tool_choice": choice},
        )
        for step, (prompt, written) in enumerate(calls)
    ]  # fmt: skip
    return trajectory(calls=tuple(made))


CALL, ANSWER = (7, 8, 1), (5,)
FIRST = (1, 2)
SECOND = (*FIRST, *CALL, 3)


def test_decisions_are_found_at_every_step_where_rollouts_share_a_prompt() -> None:
    runs = [
        rollout((FIRST, ANSWER), choice="none"),
        rollout((FIRST, CALL), (SECOND, ANSWER), forced=2, choice="any"),
        rollout((FIRST, CALL), (SECOND, CALL), ((*SECOND, *CALL, 4), ANSWER)),
        rollout((FIRST, CALL), ((*FIRST, *CALL, 9), CALL)),  # another observation: nobody else stands there
        rollout((FIRST, CALL), (SECOND, CALL)),
    ]
    J = np.array([[1.0, 0.5, 2.0, 0.0, 1.0]])
    free = np.zeros((1, 5))
    found = openings(runs, J, free, np.array([[True, True, True, True, False]]), [-0.3], np.array([True]), price=0)
    # One of its three callers stands for the first decision; at the second prompt calling (2.0) beats answering (0.5),
    # by two of the five rollouts.
    assert {place: (it.tokens, pytest.approx(it.contrast)) for place, it in found.items()} == {
        (1, 0): (2, pytest.approx(-0.3)),
        (2, 0): (2, 0.0),
        (3, 0): (2, 0.0),
        (2, 1): (2, pytest.approx(1.5 * 2 / 5)),
    }
    which, contrast = by_token(found, [(2, segments(runs[2])[0].starts), (0, ((0, 0),))], 10)
    #         call      observed  call      observed  answer
    assert which[0].tolist() == [1, 1, 0, 0, 2, 2, 0, 0, 0, 0]
    assert contrast[0].tolist() == pytest.approx([0.0, 0.6])
    assert not which[1].any()
    assert not contrast[1].any()
    assert openings(runs, J, free, np.ones((1, 5), dtype=bool), [-0.3], np.array([False]), price=0) == {}


def test_at_later_decisions_what_was_spent_before_is_not_counted_again() -> None:
    third = (*SECOND, *CALL, 4)
    runs = [
        rollout((FIRST, ANSWER), choice="none"),
        rollout((FIRST, CALL), (SECOND, ANSWER)),
        rollout((FIRST, CALL), (SECOND, CALL), (third, ANSWER), forced=2),
        rollout((FIRST, CALL), (SECOND, CALL), (third, CALL)),
    ]
    r, cost = np.array([[0.0, 1, 1, 1]]), np.array([[0.0, 1, 2, 3]])
    found = openings(runs, r, cost, np.ones((1, 4), dtype=bool), [0.4], np.array([True]), price=0.5)
    # Each call too many is priced as a first one would be: 1/2 for one, 1/3 for two, against 1 for none.
    assert found[1, 0].contrast == 0.4
    assert found[2, 1].contrast == pytest.approx(0.5 * ((1 / 2 + 1 / 3) / 2 - 1) * 3 / 4)
    assert found[3, 2].contrast == pytest.approx(0.5 * (1 / 2 - 1) * 2 / 4)
    # A reply without a call that is asked again has not ended the run: what it comes to says nothing of what was spent.
    slipped = [runs[0], rollout((FIRST, CALL), (SECOND, ANSWER), (third, CALL)), *runs[2:]]
    assert (2, 1) not in openings(slipped, r, cost, np.ones((1, 4), dtype=bool), [0.4], np.array([True]), price=0.5)


def test_what_a_run_came_to_says_nothing_of_the_decisions_before_a_forced_one() -> None:
    third = (*SECOND, *CALL, 4)
    runs = [
        rollout((FIRST, ANSWER), choice="none"),
        rollout((FIRST, CALL), (SECOND, ANSWER)),  # forced to answer at the second
        rollout((FIRST, CALL), (SECOND, CALL), (third, ANSWER), forced=2, choice="any"),
        rollout((FIRST, CALL), (SECOND, CALL), (third, ANSWER)),  # at the third
        rollout((FIRST, CALL), (SECOND, CALL), (third, CALL)),
        rollout((FIRST, CALL), (SECOND, ANSWER)),  # at the third, to which it never came
    ]
    runs[1] = replace(runs[1], calls=(runs[1].calls[0], replace(runs[1].calls[1], sampling={"tool_choice": "none"})))
    J, included = np.array([[1.0, 0.0, 0.7, 0.5, 0.9, 0.2]]), np.ones((1, 6), dtype=bool)
    given = runs, J, np.zeros((1, 6)), included, [0.0], np.array([True])
    found = openings(*given, price=0, forced_at=(0, 1, 0, 2, -1, 2))
    # At the second: calling is the mean of .7 and .9, without the one that was cut short later; answering that of 0 and
    # .2. At the third .9 against .7 and .5: three of the six stood there.
    contrasts = {place: it.contrast for place, it in found.items() if it.contrast}
    assert contrasts == {(2, 1): pytest.approx((0.8 - 0.1) * 5 / 6), (4, 2): pytest.approx((0.9 - 0.6) * 3 / 6)}
    unforced = openings(*given, price=0)
    assert (2, 1) in unforced
    assert unforced[2, 1].contrast == pytest.approx((0.7 - 0.2) * 4 / 6)  # the banned one is nobody's choice

    scores = Scores(
        r_ans=np.array([[1.0, 0, 1, 1, 1, 0]]), r_fmt=np.ones((1, 6)), T=np.array([[0, 1, 2, 2, 3, 1]]),
        cost=np.array([[0.0, 1, 2, 2, 3, 1]]), excluded=np.zeros((1, 6), dtype=bool),
    )  # fmt: skip
    cut = np.array([[False, True, False, True, False, False]])
    Delta = advantages(Objective(name="contrast", price=0.5), scores, cut=cut).contrast
    # Calls: r = 1, 1, 0 and e = 1/3, 1/4, 0; answering: 1 and 1.
    assert Delta.tolist() == pytest.approx([(2 / 3 - 1) + 0.5 * ((1 / 3 + 1 / 4) / 3 - 1)])


@pytest.mark.parametrize("groups", [200, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_random_runs_of_several_steps_equal_the_transcription(groups: int) -> None:
    rng = np.random.default_rng(groups)
    for _ in range(groups):
        runs, G = [], 6
        for i in range(G):
            prompt: tuple[int, ...] = FIRST
            replies: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
            for step in range(3):
                called = i == 0 if step == 0 and i < 2 else rng.random() < 0.5
                replies.append((prompt, CALL if called else ANSWER))
                prompt = (*prompt, *CALL, int(rng.integers(2)))
                if not called:
                    break
            runs.append(rollout(*replies, forced=2 * (i == 0)))
        r, included = rng.random((1, G)).round(1), rng.random((1, G)) < 0.9
        cost = np.array([[sum(call.completion_ids == CALL for call in run.calls) for run in runs]])
        found = openings(runs, r, cost, included, [0.5], np.array([True]), price=0.3)
        expected: dict[tuple[int, int], float] = {}
        inside = [i for i in range(G) if included[0, i]]
        for i in inside:
            for k, call in enumerate(runs[i].calls):
                same = [
                    (j, n, runs[j].calls[n].completion_ids == CALL)
                    for j in inside
                    for n in range(len(runs[j].calls))
                    if runs[j].calls[n].prompt_ids == call.prompt_ids
                ]
                values = {b: [r[0, j] + 0.3 * r[0, j] / (1 + cost[0, j] - k) for j, _, it in same if it == b]
                          for b in (True, False)}  # fmt: skip
                if call.completion_ids != CALL or (k and not values[False]):
                    continue
                worth = (np.mean(values[True]) - np.mean(values[False])) * len(same) / G if k else 0.5
                callers = [(j, n) for j, n, it in same if it]
                expected[i, k] = worth if (i, k) == min(callers) else 0.0
        assert {place: it.contrast for place, it in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["contrast", pytest.param("hdpo", marks=pytest.mark.exhaustive)])
def test_a_trainer_forces_later_decisions_and_learns_from_them(tmp_path: Path, objective: str) -> None:
    model = cold_start()
    groups = StratifiedGroups(size=6, direct=2, tool=2, steps=2)
    rollouts = rollouts_of(model, tmp_path, calls=3)
    options = {"objective": objective, "max_steps": 1, "forced_steps": 2}
    trainer = trainer_of(tmp_path, arguments(tmp_path, groups, **options), model=model, rollouts=rollouts)
    trainer.train()
    (runs,) = rollouts.batches
    kept = list(zip(runs, groups.forced_at() * (len(runs) // 6), strict=True))
    later = [run for run, at in kept if at == 1 and len(run.calls) > 1]
    assert {run.branch for run in later} == {"direct", "tool"}
    for run in later:
        first, second = run.calls[:2]
        assert not first.forced
        assert first.tool_calls
        assert bool(second.forced) == (run.branch == "tool")
        assert (second.sampling["tool_choice"] == "none") == (run.branch == "direct")
        assert len(run.calls) == 2 or run.branch == "tool"
    step = trainer._step_batch
    assert not np.allclose(step.weights, step.weights[:, :1])
    if objective == "contrast":
        assert any(it.contrast for (_, call), it in step.openings.items() if call == 1)


def test_the_trainers_loss_is_that_of_the_formulas(tmp_path: Path) -> None:
    model = cold_start()
    rollouts = rollouts_of(model, tmp_path)
    options = {"objective": "contrast", "max_steps": 1, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, arguments(tmp_path, STRATIFIED, **options), model=model, rollouts=rollouts)
    batches: list[dict[str, torch.Tensor]] = []
    compute, losses = trainer._compute_loss, []

    def noted(model: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(dict(inputs))
        losses.append(compute(model, inputs))  # type: ignore[arg-type]
        return losses[-1]

    trainer._compute_loss = noted  # type: ignore[method-assign]
    trainer.train()
    (inputs,), (runs,) = batches, rollouts.batches
    assert np.isfinite(logged(trainer, "hdpo/decision_loss")).all()
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    log_probs, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, attention, inputs["completion_ids"].shape[1]
    )
    step, log_probs = trainer._step_batch, log_probs.detach().double().numpy()
    A = (step.channels.acc.double().numpy() * step.weights).flatten()
    opening = next(run.calls[0].completion_ids[: run.calls[0].forced] for run in runs if run.branch == "tool")
    # TRL has shuffled the rows.
    found = {(segment.prompt_ids, segment.completion_ids): i for i, run in enumerate(runs) for segment in segments(run)}
    content, hinges = 0.0, [[] for _ in range(len(runs) // 4)]
    for row, own in enumerate(mask):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
        written = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
        run = found[tuple(prompt), tuple(written)]
        called = tuple(written[: len(opening)]) == opening
        # On policy each ratio is 1, and the loss of a token of content -A.
        content -= A[run] * int(own[len(opening) if called else 0 :].sum())
        if called:
            log_p, sign = log_probs[row, : len(opening)].sum(), np.sign(step.channels.contrast[run // 4].item())
            hinges[run // 4].append(max(0.0, Objective().odds - sign * (log_p - np.log(-np.expm1(log_p)))))
    worth = step.channels.contrast.abs().tolist()
    decision = np.mean([abs(Delta) * np.mean(hinge) for Delta, hinge in zip(worth, hinges, strict=True)])
    assert decision > 0
    weighed = content / int(mask.sum()) + Objective().w_decision * decision
    assert losses[0].item() == pytest.approx(weighed, abs=1e-4)
    assert len(set(inputs["openings"].flatten().tolist())) >= 2


def test_micro_batches_make_the_update_of_the_whole_batch(tmp_path: Path) -> None:
    trained = []
    for rows, parts in ((8, 1), (4, 2)):
        model = cold_start()
        split = {
            "per_device_train_batch_size": rows,
            "steps_per_generation": parts,
            "gradient_accumulation_steps": parts,
        }
        options = {"objective": "contrast", "max_steps": 1, "learning_rate": 0.5, "max_grad_norm": 1e9, **split}
        trainer_of(tmp_path / str(rows), arguments(tmp_path, STRATIFIED, **options), model=model).train()
        trained.append(model)
    assert furthest(trained[0], cold_start()) > 1e-2  # or the comparison says nothing
    assert furthest(*trained) < 1e-4


def test_the_decision_settles_on_direct_only_where_a_call_gains_less_than_its_price() -> None:
    """The claim of docs/accuracy-safe.md: 400 questions with known accuracies, groups of four rollouts a branch."""
    rng, w, n = np.random.default_rng(0), 0.3, 4
    p_D, p_T = rng.random((2, 400))
    l = torch.full((400,), 4.0, requires_grad=True)  # noqa: E741 - the formula's name; at first all call
    tail = torch.zeros(400)
    for step in range(500):
        r_D, r_T = (torch.tensor(rng.binomial(n, p) / n).float() for p in (p_D, p_T))
        Delta = (1 + w / 2) * r_T - (1 + w) * r_D
        loss = decision_loss(torch.nn.functional.logsigmoid(l), Delta, margin=4.0).sum()
        (gradient,) = torch.autograd.grad(loss, l)
        l.data -= (0.5 if step < 150 else 0.05) * gradient
        tail += l.data if step >= 250 else 0
    worth = (1 + w / 2) * p_T - (1 + w) * p_D
    clear = np.abs(worth) > 0.1
    np.testing.assert_array_equal((tail.numpy() > 0)[clear], (worth > 0)[clear])
    direct = tail.numpy() < 0
    assert (p_T - p_D)[direct].max() <= w


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_a_policy_that_never_has_enough_learns_to_stop_where_later_decisions_are_forced(steps: int) -> None:
    """Two hops without a transformer: a question needs 0, 1 or 2 calls, and each state has log-odds of its own."""
    rng, groups, w = np.random.default_rng(0), StratifiedGroups(size=12, direct=3, tool=3, steps=steps), 0.5
    l = torch.full((3, 5), 6.0)  # noqa: E741 - the formula's name; calls needed by calls made; at first it goes on
    l[:, 4] = -99.0
    l.requires_grad_(True)
    optimizer = torch.optim.SGD([l], lr=4.0)
    for _ in range(40):
        losses = []
        for needed in range(3):
            runs, right, cost = [], [], []
            odds = torch.sigmoid(l[needed]).tolist()
            for branch, at in zip(groups.branches(), groups.forced_at(), strict=True):
                calls = next(
                    k for k in range(5) if not (branch == "tool" if k == at else rng.random() < odds[k])
                )  # fmt: skip
                prompts = [(needed, *CALL * k) for k in range(calls + 1)]
                replies = [(prompt, CALL if k < calls else ANSWER) for k, prompt in enumerate(prompts)]
                run = rollout(*replies, forced=2 * (branch == "tool" and at == 0))
                banned = {"tool_choice": "none"} if branch == "direct" and at == calls else {}
                runs.append(replace(run, calls=(*run.calls[:-1], replace(run.calls[-1], sampling=banned))))
                right.append(float(calls >= needed))
                cost.append(float(calls))
            later = later_decisions(runs, groups, np.array([True]))
            called = torch.tensor([[len(run.calls) > 1 for run in runs]])
            whole = torch.ones_like(called) if steps == 1 else ~torch.tensor(cut(later, groups))
            r, T = np.array([right]), np.array([cost])
            Delta = contrasts(torch.tensor(r * (1 + w / (1 + T))), called, whole).tolist()
            found = openings(
                runs, r, T, np.ones((1, 12), bool), Delta, np.array([True]), price=w, forced_at=groups.forced_at()
            )
            losses += [
                decision_loss(torch.nn.functional.logsigmoid(l[needed, step]), torch.tensor(it.contrast), margin=6.0)
                for (_, step), it in found.items()
            ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        l.grad[:, 4] = 0
        optimizer.step()
    makes = [next(k for k in range(5) if l[needed, k] < 0) for needed in range(3)]
    # Forced at the first decision alone, only that one is learnt.
    assert makes == ([0, 1, 2] if steps == 3 else [0, 4, 4])


def test_a_contrast_needs_both_branches() -> None:
    with pytest.raises(ConfigurationError, match="at least one rollout down each"):
        arguments(Path("/none"), StratifiedGroups(size=4, direct=0, tool=1), objective="contrast")
