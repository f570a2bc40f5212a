"""The audit of the almanac's agent, by the same tiny model, against the truth: forced direct, so many times."""

import asyncio
import hashlib

import numpy as np
import pytest

pytest.importorskip("torch")

from metis_agent.agent import create_metis_agent
from metis_agent.audit.accounting import uses
from metis_agent.audit.agreement import Agreement, Verdicts
from metis_agent.audit.probes import Prober, Probing
from metis_agent.audit.run import audit
from metis_agent.audit.turns import ToolEffects, survey
from metis_agent.judging.verifiers import verify
from metis_agent.models.local import LocalChatModel
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rollouts.branches import BranchPlan, BranchRecorder, branch_rollouts
from metis_agent.rules.budget import Budget
from metis_agent.sqlite import DiskCache
from metis_agent.worlds.almanac.agent import COLD_START, almanac_tools
from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN, questions

TIMES = 4
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # tools run in sandboxes, some hundred of them


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(model, free runs, share of right answers without tools by question, what the probes said)."""
    chat = LocalChatModel.load(COLD_START, model_name="almanac", max_new_tokens=24, temperature=1.0)
    tools = almanac_tools()
    asked = questions("test", 90, seed=3, kinds=(*KINDS, PARTIALLY_KNOWN))

    def build(gate):
        return create_metis_agent(chat, tools, gate=gate, budget=Budget(calls=1), block_message="Error.")

    with TrajectoryStore(tmp_path_factory.mktemp("almanac") / "runs") as store:
        plan = BranchPlan(direct=TIMES, tool=0, free=1)
        BranchRecorder(build, store, concurrency=128).record(
            branch_rollouts(asked, [tool.name for tool in tools], plan, name="truth", seed=0)
        )
        runs = list(store.read())
    right = {}
    for run in runs:
        if run.branch == "direct":
            right.setdefault(run.question.id, []).append(bool(verify(run.question, run.answer)))
    return (
        chat,
        [run for run in runs if run.branch == "free"],
        {id: np.mean(found) for id, found in right.items()},
        DiskCache(None),
    )


def audited(recorded, verdicts, checks=None):
    chat, runs, _, cache = recorded
    found = survey(runs, ToolEffects(reads=["*"]))
    prober = Prober(chat, name="almanac", cache=cache, probing=Probing(concurrency=128))
    return asyncio.run(audit(found, prober, verdicts, self_reports=False, checks=checks))


def truth_of(recorded, findings):
    """Expected share of calls on questions that the model answers rightly without them."""
    share = recorded[2]
    return float(np.mean([share[turn.run.question.id] for turn in findings.survey.sample]))


def test_with_exact_verdicts_the_truth_is_within_the_interval(recorded):
    findings = audited(recorded, Verdicts())
    redundant = findings.figures.redundant
    assert findings.figures.sampled > 60
    assert redundant.low <= truth_of(recorded, findings) <= redundant.high
    assert redundant.high - redundant.low < 0.3
    # Sums and greetings are known by heart; products of four-digit numbers are not.
    by_kind = {row.name: row.redundant.value for row in findings.figures.by_kind}
    assert by_kind["product"] < 0.2 < 0.5 < by_kind["sum"]


class ErringJudge(Verdicts):
    """Rules as a judge does that errs one time in ten, on every state but the run's own answer."""

    def _without_judge(self, turn, k, probe):
        ruled = super()._without_judge(turn, k, probe)
        if ruled.source != "reference" or probe is None:
            return ruled
        lot = hashlib.sha256(f"{turn.run.id}/{k}".encode()).digest()[0]
        return Agreement(agrees=ruled.agrees if lot >= 26 else not ruled.agrees, source="judge")


def test_a_judge_that_errs_is_corrected_to_the_truth(recorded):
    exact = audited(recorded, Verdicts())
    right = {(turn.id, 0): turn.verdicts[0] for turn in exact.turns}
    some = dict(list(right.items())[:40])
    findings = audited(recorded, ErringJudge(), checks=some)
    figures = findings.figures
    assert (figures.checked, figures.checked_pairs) == (40, 40)
    assert 1 <= figures.judge_wrong <= 10
    assert figures.redundant.low <= truth_of(recorded, findings) <= figures.redundant.high
    # Closer to what exact verdicts say than the judge was, or as close.
    known = exact.figures.redundant.value
    assert abs(figures.redundant.value - known) <= abs(figures.judged.value - known) + 0.02
    assert all(use in ("redundant", "necessary", "lost") for turn in findings.turns for it in uses(turn) for use in it)
