"""The audit of the almanac's agent, from traces of the real LangSmith client, against the truth."""

import pytest

pytest.importorskip("torch")

from metis_agent.audit.accounting import uses
from metis_agent.audit.agreement import Verdicts
from metis_agent.worlds.almanac.questions import KINDS, PARTIALLY_KNOWN, questions
from tests.audit.almanac import ErringJudge, audited, checked_by_hand, world

pytestmark = [  # tools run in sandboxes, some dozens of them
    pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.enable_socket, pytest.mark.allow_hosts(["127.0.0.1"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    asked = questions("test", 60, seed=3, kinds=(*KINDS, PARTIALLY_KNOWN))
    return world(asked, 3, tmp_path_factory.mktemp("almanac"))


@pytest.fixture(scope="module")
def exact(traced):
    return audited(traced, Verdicts())


def test_with_exact_verdicts_the_truth_is_within_the_interval(traced, exact):
    redundant = exact.figures.redundant
    assert exact.figures.sampled > 40
    assert redundant.low <= traced.truth(exact) <= redundant.high
    assert redundant.high - redundant.low < 0.35
    # Sums and greetings are known by heart; products of four-digit numbers are not.
    by_kind = {row.name: row.redundant.value for row in exact.figures.by_kind}
    assert by_kind["product"] < 0.2 < 0.5 < by_kind["sum"]


def test_a_judge_that_errs_is_corrected_to_the_truth(traced, exact):
    findings = audited(traced, ErringJudge(), checks=checked_by_hand(exact, 40))
    figures = findings.figures
    assert (figures.checked, figures.checked_pairs) == (40, 40)
    assert 1 <= figures.judge_wrong <= 10
    assert figures.redundant.low <= traced.truth(findings) <= figures.redundant.high
    # Closer to what exact verdicts say than the judge was, or as close.
    known = exact.figures.redundant.value
    assert abs(figures.redundant.value - known) <= abs(figures.judged.value - known) + 0.02
    assert all(use in ("redundant", "necessary", "lost") for turn in findings.turns for it in uses(turn) for use in it)
