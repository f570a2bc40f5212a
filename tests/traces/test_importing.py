"""The import itself: stopped and taken up again, bad input, secrets, formats from outside the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from metis_agent.cli import app
from metis_agent.errors import ConfigurationError, InputError, StorageError
from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import (
    Importer,
    Trace,
    import_traces,
    importer_names,
    reading,
    register_importer,
    registry,
)
from metis_agent.traces.importers import langsmith
from metis_agent.traces.values import as_json
from tests.traces.agents import SECRET
from tests.traces.exports import asked, lines, rejects, run, said, whole

ROOT = Path(__file__).parents[2]


# --- stopped and taken up again --------------------------------------------------------------------------------------

KILLED = """
import os, sys
from metis_agent.recording.store import TrajectoryStore
from metis_agent.traces import importing, import_traces
from metis_agent.traces.reading import Spool
importing._EVERY_SECONDS = 0
importing.shelves_for = lambda size: 3

def killed_at(where, count):
    owner, method = (Spool, "add") if where == "reading" else (TrajectoryStore, "append")
    true, left = getattr(owner, method), [count]
    def counted(self, *args):
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        return true(self, *args)
    setattr(owner, method, counted)
    import_traces([source], TrajectoryStore(store))

source, store, *kills = sys.argv[1:]
for kill in kills:
    where, _, count = kill.partition("=")
    if not (child := os.fork()):
        killed_at(where, int(count))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, kill
"""
KILLS = ["reading=3", "reading=20", "reading=1", "reading=12", "storing=0", "storing=7", "storing=9", "storing=1",
         "storing=0", "storing=3"]  # fmt: skip


def test_killed_ten_times_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("metis_agent.traces.importing.shelves_for", lambda size: 3)
    records = [record for number in range(30) for record in whole(f"t{number}", f"Question {number}?")]
    records = [*records[::2], '{"torn": \n', *records[1::2], records[0], run("x", 1, "chain")]
    export = tmp_path / "export.jsonl"
    export.write_text(lines(*records))
    with TrajectoryStore(tmp_path / "alone") as store:
        alone = import_traces([export], store)
        expected = {trajectory.id: trajectory for trajectory in store.read()}
    argv = [sys.executable, "-c", KILLED, str(export), str(tmp_path / "killed"), *KILLS]
    subprocess.run(argv, cwd=ROOT, check=True)
    with TrajectoryStore(tmp_path / "killed") as store:
        report = import_traces([export], store)
        found = list(store.read())
    assert len(found) == len(expected) == 30
    assert {trajectory.id: trajectory for trajectory in found} == expected
    for name in ("records", "parts", "traces", "trajectories", "duplicates", "rejected", "handled", "reasons"):
        assert getattr(report, name) == getattr(alone, name), name
    assert [r["reason"] for r in rejects(report)] == [r["reason"] for r in rejects(alone)]
    assert not list((tmp_path / "killed" / "imports").glob("*/spool"))


def test_the_same_trace_twice_is_one(imported):
    first, _ = imported(lines(*whole("t1"), *whole("t2")))
    again, _ = imported(lines(*whole("t1"), *whole("t2")))
    other, runs = imported(lines(*whole("t2"), *whole("t3")), "other.jsonl")
    assert [(r.trajectories, r.duplicates) for r in (first, again, other)] == [(2, 0), (0, 2), (1, 1)]
    assert [trajectory.id for trajectory in runs] == [f"langsmith/t{n}-0/0" for n in (1, 2, 3)]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_half_written_export(imported):
    content = lines(*whole("t1"), *whole("t2"))
    report, runs = imported(content[:-40])
    assert len(runs) == 1  # the second trace's answer is cut off
    assert report.rejected == 2
    torn, cut = rejects(report)
    assert "half-written export" in torn["reason"]
    assert torn["record"] == 4
    assert cut["trace"] == "t2-0"


def test_feedback_without_a_name_and_with_an_odd_value(imported):
    odd = {"id": "f", "run_id": None, "trace_id": "a-0", "key": None, "score": "good", "value": {"a": [1]}}
    report, (only,) = imported(lines(*whole("a"), odd))
    assert (report.rejected, only.answer) == (0, "Ann.")
    assert only.metadata["feedback"] == [{"key": "feedback", "score": "good", "value": {"a": [1]}}]


def test_spans_within_each_other_without_end(imported, monkeypatch):
    """An agent that ran away: each run within the one before, and a circle of two."""
    asked_for = []
    monkeypatch.setattr(langsmith, "_mapping", lambda value: asked_for.append(1) or as_json(value) or {})
    deep = [run("a", n, "chain", parent_run_id=f"a-{n - 1}" if n else None) for n in range(600)]
    last = whole("a")[1] | {"id": "a-call", "parent_run_id": "a-599"}
    circle = [it | {"parent_run_id": f"b-{1 - n}"} for n, it in enumerate(whole("b"))]
    report, _ = imported(lines(*deep, last, *circle))
    assert (report.trajectories, report.rejected) == (2, 0)
    assert len(asked_for) < 2 * 600 * 256  # twice for each span: at most so many around it


def test_lines_and_traces_over_the_limit(imported, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 4_000)
    monkeypatch.setattr(reading, "_LARGEST", 20_000)
    huge = run("t2", 0, "chain", inputs={"text": "x" * 10_000_000}, outputs={})
    many = [run("t3", n, inputs=asked("t3", "y" * 2_000), outputs=said()) for n in range(1, 20)]
    report, runs = imported(lines(huge, *many, *whole("t1")))
    assert [trajectory.id for trajectory in runs] == ["langsmith/t1-0/0"]
    over, large = rejects(report)
    assert over["record"] == 1
    assert "one record may take 4,000" in over["reason"]
    assert len(over["content"]) < 5_000
    assert "larger than" in large["reason"]
    assert large["trace"] == "t3-0"


def test_a_trace_without_its_root_spans_twice_and_clocks_that_run_backwards(imported):
    orphan = whole("t1")[1]
    began = {**whole("t2")[1], "end_time": None, "outputs": None}
    back = [run("t3", 0, "chain", end_time="2025-12-31T23:59:00Z"), run("t3", 1, inputs=asked("t3"), outputs=said())]
    back[1]["end_time"] = "2025-12-31T23:59:59Z"
    report, runs = imported(lines(orphan, *whole("t2"), began, *back))
    assert report.handled == {"trace without a root": 1, "span that came twice": 1, "clock ran backwards": 2}
    assert [trajectory.answer for trajectory in runs] == ["Ann."] * 3
    assert [trajectory.metadata.get("incomplete") for trajectory in runs] == [True, None, None]
    assert runs[2].seconds == 0
    assert runs[2].calls[0].seconds == 0


def test_chunks_of_a_streamed_reply_as_spans_of_their_own(imported):
    root, call = whole("t1")
    call["outputs"] = None
    chunks = [
        run("t1", n, inputs={}, outputs=said(text), parent_run_id=call["id"]) for n, text in ((3, "nn."), (2, "A"))
    ]
    beside = [
        root | {"id": "t2-0", "trace_id": "t2-0"},
        call | {"id": "t2-1", "trace_id": "t2-0", "parent_run_id": "t2-0"},
    ]
    beside += [run("t2", n, inputs={}, outputs=said(text)) for n, text in ((2, "A"), (3, "nn."))]
    report, runs = imported(lines(root, call, *chunks, *beside))
    assert [trajectory.answer for trajectory in runs] == ["Ann.", "Ann."]
    assert report.handled == {"span joined to the call around it": 4}


def test_results_that_only_a_tool_run_or_the_root_holds(imported):
    call = {"name": "look", "args": {"query": "x"}, "id": "c1"}
    ended = run("t1", 0, "chain", inputs={}, outputs={})
    tool = run("t1", 2, "tool", inputs={"input": "{'query': 'x'}"}, outputs={"output": "found"}, name="look")
    failed = run("t2", 2, "tool", inputs={"input": "{'query': 'x'}"}, error="Timeout: no answer", name="look")
    root = run("t2", 0, "chain", inputs={}, error="Timeout: no answer", outputs=None)
    calls = [run(trace, 1, inputs=asked(trace), outputs=said("", call)) for trace in ("t1", "t2", "t3")]
    cut = run("t3", 0, "chain", inputs={}, outputs=None, end_time=None)
    _, (direct, broken, unfinished) = imported(lines(ended, tool, failed, root, *calls, cut))
    assert (direct.status, direct.answer) == ("finished", "found")  # as a tool that answers the user directly
    assert direct.outcomes[0].seconds == 1
    assert (broken.status, broken.error) == ("failed", "Timeout: no answer")
    assert [outcome.status for outcome in broken.outcomes] == ["timeout"]
    assert (unfinished.status, unfinished.error) == ("failed", "the record ends before the run did")


def test_calls_of_a_sub_agent_and_of_a_guard_are_counted_but_are_not_the_run(imported):
    call = {"name": "research", "args": {}, "id": "c1"}
    inner = {"name": "look", "args": {}, "id": "i1"}
    history = [{"type": "human", "content": "Who?"}, {"type": "ai", "content": "", "tool_calls": [call]}]
    history += [{"type": "tool", "content": "Ann", "tool_call_id": "c1"}]
    sub = [{"type": "human", "content": "sub"}, {"type": "ai", "content": "", "tool_calls": [inner]}]
    sub += [{"type": "tool", "content": "x", "tool_call_id": "i1"}]
    tokens = {"usage_metadata": {"input_tokens": 7, "output_tokens": 1, "total_tokens": 8}}
    records = [
        run("t1", 0, "chain"),
        run("t1", 1, inputs=asked("t1", "Is this safe?"), outputs=said("yes") | tokens, name="guard"),
        run("t1", 2, inputs=asked("t1"), outputs=said("", call), name="main"),
        run("t1", 3, "tool", name="research", outputs={"output": "Ann"}),
        run("t1", 4, inputs=asked("t1", "sub"), outputs=said("", inner), parent_run_id="t1-3", name="sub"),
        run("t1", 5, inputs={"messages": [sub]}, outputs=said("Ann"), parent_run_id="t1-3", name="sub"),
        run("t1", 6, inputs={"messages": [history]}, outputs=said("Ann."), name="main"),
    ]
    _, (only,) = imported(lines(*reversed(records)))
    assert (only.question.text, only.answer) == ("Who?", "Ann.")
    assert [outcome.tool for outcome in only.outcomes] == ["research"]
    assert [call.node for call in only.calls] == ["main", "main", "guard", "sub", "sub"]
    assert only.calls[2].usage["input_tokens"] == 7


def test_a_history_that_was_trimmed_goes_on_from_what_is_known(imported):
    call = {"name": "look", "args": {}, "id": "c1"}
    old = [
        {"type": "human", "content": "Old?"},
        {"type": "ai", "content": "Old."},
        {"type": "human", "content": "Who?"},
    ]
    asks = {"type": "ai", "content": "", "tool_calls": [call]}
    trimmed = [old[2], asks, {"type": "tool", "content": "Ann", "tool_call_id": "c1"}]
    _, (only,) = imported(
        lines(
            run("t1", 0, "chain"),
            run("t1", 1, inputs={"messages": [old]}, outputs=said("", call)),
            run("t1", 2, inputs={"messages": [trimmed]}, outputs=said("Ann.")),
        )
    )
    assert only.answer == "Ann."
    assert [message["data"]["content"] for message in only.history] == ["Old?", "Old."]
    assert len(only.calls) == 2


def test_a_format_that_is_not_known(imported, tmp_path):
    with pytest.raises(InputError, match=r"keys colour, size.*--format \(langsmith"):
        imported(lines({"colour": 1, "size": 2}))
    with pytest.raises(ConfigurationError, match="no importer 'mine'"):
        imported(lines(*whole("t")), format="mine")
    with TrajectoryStore(tmp_path / "store") as store, pytest.raises(StorageError, match="names no file"):
        import_traces([tmp_path / "nowhere"], store)


# --- what comes along ------------------------------------------------------------------------------------------------


def test_secrets_are_taken_out_everywhere(imported, tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_API_KEY", "a plain word in the environment")
    call = {"name": "look", "args": {"key": SECRET}, "id": "c1"}
    history = [{"type": "human", "content": f"My key is {SECRET}"}, {"type": "ai", "content": "", "tool_calls": [call]}]
    history += [{"type": "tool", "content": f"{SECRET} a plain word in the environment", "tool_call_id": "c1"}]
    records = [
        run("t1", 0, "chain"),
        run("t1", 1, inputs={"messages": [history[:1]]}, outputs=said("", call)),
        run("t1", 2, inputs={"messages": [history]}, outputs=said(f"It is {SECRET}.")),
        {"run_type": "llm", "note": SECRET},
    ]
    report, (only,) = imported(lines(*records))
    assert report.rejected == 1
    kept = "".join(path.read_text() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert SECRET not in kept
    assert "a plain word in the environment" not in kept
    assert only.question.text == "My key is [redacted]"


def test_images_come_along_once(imported, tmp_path):
    import base64
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    block = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    human = {"type": "human", "content": [{"type": "text", "text": "What is it?"}, block]}
    records = [run("t1", 0, "chain"), run("t1", 1, inputs={"messages": [[human]]}, outputs=said("Noise."))]
    _, (only,) = imported(lines(*records))
    assert only.messages[0]["data"]["content"][1] == block
    assert len(list((tmp_path / "store" / "images").iterdir())) == 1


# --- formats from outside the package --------------------------------------------------------------------------------


class Diary(Importer):
    """Lines of question, tab, answer."""

    name, title, source, versions = "diary", "A diary", "the test", "1"

    def recognises(self, record):
        return "dear_diary" in record

    def parts(self, record):
        yield record["day"], record

    def traces(self, key, parts):
        said = [{"type": "human", "content": parts[0]["dear_diary"]}, {"type": "ai", "content": parts[0]["reply"]}]
        yield Trace(id=key, source=self.name, messages=said, every_turn=True)


@pytest.fixture
def diary(monkeypatch):
    monkeypatch.setattr(registry, "_IMPORTERS", dict(registry._IMPORTERS))
    register_importer("diary", Diary)


def test_a_format_can_be_added(imported, diary):
    report, (only,) = imported(lines({"day": "monday", "dear_diary": "Why?", "reply": "So."}))
    assert (report.format, only.id, only.answer) == ("diary", "diary/monday/0", "So.")
    assert "diary" in importer_names()


def test_every_importer_says_where_its_format_is_documented():
    for name in importer_names():
        one = registry.importer(name)
        assert one.name == name
        assert one.title
        assert one.versions
        assert one.source.startswith("https://")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    (tmp_path / "export.jsonl").write_text(lines(*whole("t1"), "{torn\n"))
    argv = ["import", str(tmp_path / "export.jsonl"), "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(app, [*argv, "--json", str(tmp_path / "figures.json")])
    assert shown.exit_code == 0, shown.output
    assert "3 langsmith records, 1 traces: 1 turns" in " ".join(shown.output.split())
    assert "1 could not be read" in " ".join(shown.output.split())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["trajectories"], figures["rejected"]) == (1, 1)
    assert "done:" in Path(figures["log"]).read_text()
    assert CliRunner().invoke(app, ["import"]).exit_code == 2
    assert "langfuse" in CliRunner().invoke(app, ["import", "--formats"]).output


def test_importing_the_package_imports_no_importer():
    code = "import sys, metis_agent; print([name for name in sys.modules if name.startswith('metis_agent.traces')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
