"""The whole audit with scripted models: the figures, the frontier, a check, the pages."""

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from metis_agent.audit.accounting import ModelPrice, Prices
from metis_agent.audit.agreement import AgreementJudge, Verdicts
from metis_agent.audit.page import audit_page
from metis_agent.audit.probes import DONE, Prober, Probing
from metis_agent.audit.run import audit, check_page, plan_probes, read_checks
from metis_agent.audit.summary import duration, headline, money, remarks
from metis_agent.audit.turns import ToolEffects, survey
from metis_agent.errors import InputError
from metis_agent.judging.rubric import Asking
from metis_agent.rollouts.outcomes import read_outcomes
from metis_agent.sqlite import DiskCache
from tests.audit.recorded import look, run
from tests.fakes import model
from tests.judging.judges import SimulatedJudge

EFFECTS = ToolEffects(reads=["look"], acts=["book"])
PRICES = Prices(models={"m": ModelPrice(input=1, output=1)})
USAGE = {"input_tokens": 1000, "output_tokens": 0}
HOSTILE = "</p><script>alert(1)</script>\u202e"


def knows(messages):
    """Knows capitals by heart; of orders what it has looked up."""
    question = next(message.text for message in messages if message.type == "human")
    if messages[-1].text == DONE:
        return "yes"
    if "capital" in question:
        return "Paris."
    found = [message.text for message in messages if message.type == "tool"]
    return found[-1] if found else "-1"


def records():
    found = []
    for n in range(30):
        common = {"usage": USAGE, "seconds": 1.0, "cost": 0.5, "metadata": {"model": "m"}, "conversation": f"c{n // 2}"}
        if n % 3 == 0:  # known by heart: both calls change nothing
            found.append(run(f"a{n}", "What is the capital of France?", look(), look(), answer="paris", **common))
        elif n % 3 == 1:  # the first is needed
            found.append(run(f"b{n}", f"Where is order {n}?", look(result=f"{n}"), look(result=f"{n}"),
                             answer=f"{n}", **common))  # fmt: skip
        else:  # no call at all
            found.append(run(f"c{n}", "Hello!", answer="Hi.", **common))
    return found


def audited(runs=None, *, chat=None, verdicts=None, effects=EFFECTS, **options):
    found = survey(records() if runs is None else runs, effects)
    prober = Prober(chat or model(knows), name="m", cache=DiskCache(None), prices=PRICES,
                    probing=Probing(concurrency=1, backoff=0, attempts=1))  # fmt: skip
    return asyncio.run(audit(found, prober, verdicts or Verdicts(), prices=PRICES, **options))


def judged():
    """A judge by the words, and runs whose answers it has to rule on."""

    def rule(record):
        filler = {"it", "is", "the", "code", "name", "that", "in", "was", "asked", "for"}
        first, second = (set(re.findall(r"[\w-]+", record[key].casefold())) - filler for key in ("first", "second"))
        return {"reason": "compared", "same": first == second}

    return Verdicts(judge=AgreementJudge(SimulatedJudge(rule=rule), asking=Asking(backoff=0, attempts=1)))


def test_the_figures_by_hand():
    findings = audited()
    figures = findings.figures
    # 10 turns with two redundant calls, 10 with a needed one and a redundant one: 30 of 40.
    assert (figures.turns, figures.calls, figures.sampled) == (30, 40, 20)
    assert figures.redundant.value == pytest.approx(0.75)
    assert figures.necessary.value == pytest.approx(0.25)
    # A call saved saves its tool's 0.5 and the 1,000 tokens that were read after it at $1 a million; 2 seconds.
    assert figures.dollars.value == pytest.approx(30 * 0.501)
    assert figures.seconds.value == pytest.approx(60)
    assert [(row.name, row.redundant.value) for row in figures.by_position] == [("1", 0.5), ("2", 1.0)]
    assert re.fullmatch(
        r"Of 40 tool calls in 30 turns, 75%.\[\d+,.\d+\] changed nothing; they cost \$15 and 60 seconds\.",
        headline(findings),
    )


def test_the_frontier_by_hand():
    frontier = audited().frontier
    assert frontier.turns == 20
    assert (frontier.oracle.calls.value, frontier.oracle.right.value) == (0.25, 1.0)
    # The model says that it is done at once: right for half of the turns.
    assert (frontier.self_report.calls.value, frontier.self_report.right.value) == (0.0, 0.5)
    assert frontier.best_cap.setting == 1
    # What tells the two kinds apart is in their words, so the gate finds the oracle.
    assert frontier.best_gate.right.value == 1.0
    assert frontier.best_gate.calls.value == pytest.approx(0.25)


def test_a_sample_stands_for_all():
    found = survey(records(), EFFECTS, sample=10)
    prober = Prober(model(knows), name="m", cache=DiskCache(None), prices=PRICES)
    figures = asyncio.run(audit(found, prober, Verdicts(), prices=PRICES)).figures
    assert (figures.turns, figures.calls, figures.sampled) == (30, 40, 10)
    assert 9 <= figures.dollars.value <= 21


def test_probes_are_planned_by_turn():
    names = [point.name for point in plan_probes(survey(records()[:2], EFFECTS))]
    assert sorted(names) == sorted((id_, k, ask) for id_ in ("a0", "b1") for k in (0, 1) for ask in ("answer", "done"))
    assert [name[0] for name in names] in (["a0"] * 4 + ["b1"] * 4, ["b1"] * 4 + ["a0"] * 4)


def test_an_outage_leaves_turns_out_and_says_so():
    # The ninth turn's first state is asked in vain.
    findings = audited(chat=model(*[knows] * 16, ConnectionError("down"), *[knows] * 99), self_reports=False)
    assert (findings.figures.undecided, findings.figures.sampled) == (1, 19)
    assert any("1 turn lack a verdict" in remark and "not probed" in remark for remark in remarks(findings))


def test_where_many_verdicts_are_missing_the_headline_is_what_can_be_said_all_the_same():
    # A judge that is down leaves the pairs that need none, which agree more often than the others.
    runs = [run(f"a{n}", "q", look(), answer="it is 7") for n in range(6)]
    runs += [run(f"b{n}", "q", look(), answer="it is seven") for n in range(4)]
    down = SimulatedJudge(rule=None, failures=[ConnectionError("down")] * 99)
    verdicts = Verdicts(judge=AgreementJudge(down, asking=Asking(backoff=0, attempts=1)))
    findings = audited(runs, chat=model("It is 7"), verdicts=verdicts, self_reports=False)
    assert (findings.figures.undecided, findings.figures.undecided_calls) == (4, 4)
    assert findings.figures.redundant.value == 1.0
    assert findings.figures.bounds == (0.6, 1.0)
    assert headline(findings) == (
        "Of 10 tool calls in 10 turns, between 60% and 100% changed nothing: 4 of 10 audited turns have no verdict."
    )
    assert any("4 judge unavailable" in remark for remark in remarks(findings))


def test_nothing_to_audit_says_why():
    with pytest.raises(InputError, match="--reads look"):
        audited(effects=ToolEffects())
    with pytest.raises(InputError, match="2 failed"):
        audited([replace(record, status="failed") for record in records()[:2]])


def test_the_page_holds_everything_and_runs_nothing():
    runs = [*records(), run("x", f"Order {HOSTILE}?", look(HOSTILE, HOSTILE), answer=HOSTILE, kind="")]
    page = "".join(audit_page(audited(runs), f"Title {HOSTILE}"))
    assert "changed nothing; they cost $1" in page.replace("\N{NO-BREAK SPACE}", " ")
    assert "<script" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "src=" not in page.replace("style-src", "").replace("default-src", "").replace("img-src", "")
    assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org", "", page)
    for heading in ("By tool", "By round of the run", "What a rule could save", "Runs to look at"):
        assert f"<h2>{heading}</h2>" in page


def test_a_check_corrects_the_judge(tmp_path):
    runs = [run(f"t{n}", f"Where is {n}?", look(), answer=f"It is in {n}.") for n in range(40)]
    # Of each probe the judge thinks that it tells the same; the person does not, of every third.
    order = [turn.run.id for turn in survey(runs, EFFECTS).sample]
    chat = model(*[f"In {id_[1:]}, it is." for id_ in order])
    findings = audited(runs, chat=chat, verdicts=judged(), self_reports=False)
    assert findings.figures.redundant.value == 1.0
    page = check_page(findings, 12)
    asked = re.findall(r'data-turn="([^"]+)" data-state="(\d+)"', page)
    assert [id_ for id_, _ in asked] == order[:12]
    assert "same</" not in page.replace("The same</", "").replace("Not the same</", "")  # no verdict is shown
    lines = [{"turn": id_, "state": int(k), "agrees": n % 3 > 0} for n, (id_, k) in enumerate(asked)]
    (tmp_path / "checked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checks = read_checks(tmp_path / "checked.jsonl")
    again = audited(runs, chat=model(*[f"In {id_[1:]}, it is." for id_ in order]), verdicts=judged(),
                    self_reports=False, checks=checks)  # fmt: skip
    figures = again.figures
    assert (figures.checked, figures.checked_pairs, figures.judge_wrong) == (12, 12, 4)
    assert figures.judged.value == 1.0
    assert figures.redundant.value == pytest.approx(2 / 3)
    assert any("wrong on 4 of 12" in remark for remark in remarks(again))


def test_nothing_of_the_audit_is_imported_with_the_package():
    code = "import sys, metis_agent; print([name for name in sys.modules if name.startswith('metis_agent.audit')])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_without_a_judge_there_is_nothing_to_check():
    with pytest.raises(InputError, match="nothing for a person"):
        check_page(audited(), 5)


@pytest.mark.parametrize("line", ["{", '{"turn": "a", "state": 0}', '{"turn": "a", "state": 0, "agrees": "yes"}', "[]"])
def test_a_file_of_checks_that_holds_something_else_is_refused(tmp_path, line):
    path = tmp_path / "checked.jsonl"
    path.write_text(f'{{"turn": "a", "state": 0, "agrees": null}}\n{line}\n')
    with pytest.raises(InputError, match="line 2"):
        read_checks(path)
    with pytest.raises(InputError, match="can't be read"):
        read_checks(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.5, "0.5 seconds"), (45, "45 seconds"), (150, "2.5 minutes"), (3120, "52 minutes"),
                          (7200, "2 hours"), (400_000, "4.6 days")],
)  # fmt: skip
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("dollars", "said"), [(0, "$0.00"), (0.0123, "$0.012"), (1.5, "$1.50"), (41.3, "$41")])
def test_money(dollars, said):
    assert money(dollars) == said


def test_decision_points_are_a_table_to_train_on(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in audited().points()))
    table = read_outcomes(path, direct="stop", tools={"look": "on"}, group_by="conversation")
    needed = [row for row in range(len(table)) if not table.observations[row] and "order" in table.questions[row]]
    # 20 turns of two calls; in half of them the first is needed, and the second is redundant.
    assert (len(table), len(needed)) == (40, 10)
    assert table.correct[needed].tolist() == [[0, 1]] * 10
    assert table.cost[needed].tolist() == [[0, 2]] * 10
    assert table.correct[[row + 1 for row in needed]].tolist() == [[1, 1]] * 10
    assert table.observations[needed[0] + 1].startswith("tool: look: ")
    assert len({*table.groups}) < 20
