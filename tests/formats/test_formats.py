"""What is on users' disks can be read: a frozen sample of every version of every format, and what a newer one gets.

Raise a version and this fails until `freeze` has made its sample; the old samples stay, and have to go on loading.
"""

from __future__ import annotations

import io
import json
import re
import sqlite3
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from metis_agent import formats
from metis_agent.errors import CheckpointError, ConfigurationError, InputError, SchemaVersionError
from metis_agent.gates import artefact
from metis_agent.gates.policy import PolicyGate
from metis_agent.recording import schema
from metis_agent.recording.store import TrajectoryStore
from metis_agent.types import ModelCall, Question, Trajectory
from tests.formats.freeze import FAILED, MAKERS, MARKED, QUESTION, SAMPLES, TOOLED, WHOLE, unpack

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "formats.md"
NEWER = pytest.raises(SchemaVersionError, match="Upgrade langgraph-metis")


def samples(pattern: str) -> list[Path]:
    found = sorted(SAMPLES.glob(pattern))
    assert found, pattern
    return found


def named(path: Path) -> str:
    return path.name


def test_every_version_that_this_tree_writes_is_frozen() -> None:
    assert {name for name in MAKERS if not (SAMPLES / name).exists()} == set()


@pytest.mark.parametrize(
    ("title", "version"),
    [
        ("Trajectories", schema.SCHEMA_VERSION), ("Gates", artefact.FORMAT), ("Figures", formats.FIGURES),
        ("Runs", formats.RUN), ("Questions", formats.QUESTIONS), ("Caches", formats.CACHE),
    ],
)  # fmt: skip
def test_the_documentation_names_the_version(title: str, version: int) -> None:
    assert re.search(rf"^\| {title} .*\| {version} \|", DOCS.read_text(), re.MULTILINE)


# --- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples("trajectory-*.jsonl"), ids=named)
def test_trajectories_load_with_every_field(sample: Path) -> None:
    whole, marked, failed = map(schema.loads, sample.read_text().splitlines())
    assert (whole, marked, failed) == (WHOLE, MARKED, FAILED)
    for noun, empty in (
        (whole, Trajectory(id="", question=whole.question)),
        (whole.calls[0], ModelCall(node="", step=0)),
    ):
        same = [field.name for field in fields(noun) if getattr(noun, field.name) == getattr(empty, field.name)]
        # A field that is new since this version has its default; what the version had, it has.
        new = {"allowed_log_probs", "model", "seconds", "history", "tools", "conversation", "user"}
        assert set(same) <= {"question", "status", "error"} | new, same


@pytest.mark.parametrize("sample", samples("trajectory-*.jsonl"), ids=named)
def test_a_store_of_an_earlier_version_is_read_and_added_to(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "segment-20260101T000000-old.jsonl").write_text(sample.read_text())
    with TrajectoryStore(tmp_path) as store:
        before = {run.id for run in store.read()}
        assert len(before) == 3
        store.append(Trajectory(id="new", question=QUESTION))
        assert {run.id for run in store.read()} == before | {"new"}


@pytest.mark.parametrize("sample", samples("store-*.json"), ids=named)
def test_tools_that_a_store_keeps_beside_its_lines_are_put_back(sample: Path, tmp_path: Path) -> None:
    for name, text in json.loads(sample.read_text()).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(TrajectoryStore(tmp_path, read_only=True).read()) == [TOOLED]


def test_a_newer_trajectory_is_refused() -> None:
    line = schema.dumps(WHOLE).replace('{"schema":1,', '{"schema":2,', 1)
    for read in (schema.loads, schema.identity, schema.loads_outcome):
        with NEWER:
            read(line)


def test_an_older_trajectory_goes_through_its_migrations(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "answer": record["answer"].upper()}

    old = schema.dumps(Trajectory(id="t", question=QUESTION, answer="paris"))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(schema, "MIGRATIONS", {1: answered, 2: lambda record: {**record, "error": "twice"}})
    assert (schema.loads(old).answer, schema.loads(old).error) == ("PARIS", "twice")
    assert schema.loads_outcome(old).answer == "PARIS"


# --- gates -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=samples("gate-*.json"), ids=named)
def frozen(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, list[dict[str, float]]]]:
    answers = unpack(request.param, tmp_path / "gate")
    return tmp_path / "gate", answers


def test_a_gate_answers_as_it_did_when_it_was_frozen(frozen: tuple[Path, dict[str, list[dict[str, float]]]]) -> None:
    folder, answers = frozen
    gate = PolicyGate(folder)
    assert (gate.threshold, gate.artefact.description["threshold"]["chosen"]) == (0.25, "frozen")
    for question, parts in answers.items():
        for found, was in zip(gate.score(question), parts, strict=True):
            assert found == pytest.approx(was, abs=1e-4)


@pytest.mark.parametrize("kind", ["features", "encoder", "decision_lm"])
def test_a_gate_of_another_version_is_refused(kind: str, tmp_path: Path) -> None:
    unpack(SAMPLES / f"gate-{kind}-{artefact.FORMAT}.json", folder := tmp_path / "gate")
    path = folder / artefact.GATE_FILE
    description = json.loads(path.read_text())
    path.write_text(json.dumps({**description, "format": artefact.FORMAT + 1}))
    with NEWER:
        PolicyGate(folder)
    for wrong in (0, -1, True, "1", None):
        path.write_text(json.dumps({**description, "format": wrong}))
        with pytest.raises(CheckpointError, match="no gate of ours"):
            PolicyGate(folder)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    from metis_agent.report.facts import read_evaluation, read_history

    readers: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("evaluation", read_evaluation), ("history", read_history),
    )  # fmt: skip
    for name, read in readers:
        for sample in samples(f"{name}-*.json"):
            assert read(sample)
        content = json.loads((SAMPLES / f"{name}-{formats.FIGURES}.json").read_text())
        assert content["format"] == formats.FIGURES
        (unmarked := tmp_path / "unmarked.json").write_text(json.dumps(formats.without_format(content)))
        assert read(unmarked)  # of before there were versions
        (newer := tmp_path / "newer.json").write_text(json.dumps({**content, "format": formats.FIGURES + 1}))
        with NEWER:
            read(newer)


# --- runs ------------------------------------------------------------------------------------------------------------


def silent() -> Console:
    return Console(record=True, file=io.StringIO())


def training(folder: Path) -> str:
    from metis_agent.cli.output import prepare_folder

    settings = {"model": {"path": "m"}, "data": "runs/kept", "seed": 0}
    prepare_folder(folder, settings, console := silent(), parts=("policy",), option="--out", fresh=False)
    return console.export_text()


def curation(folder: Path) -> str:
    from metis_agent.curation.pipeline import Pipeline

    resumed = (folder / "run.json").exists()
    Pipeline(folder, (), codec=None, settings={"source": "abc"})  # type: ignore[arg-type]
    return "Going on" if resumed else ""


@pytest.mark.parametrize("run", [training, curation])
def test_a_stopped_run_goes_on_unless_a_newer_metis_began_it(run: Callable[[Path], str], tmp_path: Path) -> None:
    note = tmp_path / "run.json"
    assert "Going on" not in run(tmp_path)
    begun = json.loads(note.read_text())
    assert begun["format"] == formats.RUN
    assert "Going on" in run(tmp_path)
    note.write_text(json.dumps(formats.without_format(begun)))  # of before there were versions
    assert "Going on" in run(tmp_path)
    note.write_text(json.dumps({**begun, "format": formats.RUN + 1}))
    with NEWER:
        run(tmp_path)
    note.write_text(json.dumps({**begun, "seed": 7, "data": "other", "output": "other", "settings": {"source": "x"}}))
    with pytest.raises(ConfigurationError, match="--fresh"):
        run(tmp_path)


# --- questions and caches --------------------------------------------------------------------------------------------


def test_curated_questions_load_and_newer_ones_are_refused(tmp_path: Path) -> None:
    from metis_agent.curation.prompts import question_line, read_questions

    for sample in samples("questions-*.jsonl"):
        kept, aside = read_questions(str(sample))
        assert (kept.id, kept.text, kept.answer, kept.verifier) == ("q1", QUESTION.text, "35241510", "numeric")
        assert (kept.metadata["rollouts"], aside.metadata["quarantine"]["stage"]) == ({"right": 3}, "mix")
    line = json.loads(question_line(QUESTION))
    (plain := tmp_path / "plain.jsonl").write_text(json.dumps(formats.without_format(line)) + "\n")
    assert list(read_questions(str(plain))) == [QUESTION]  # written by hand
    (newer := tmp_path / "newer.jsonl").write_text(json.dumps({**line, "format": formats.QUESTIONS + 1}) + "\n")
    with NEWER:
        list(read_questions(str(newer)))


def test_a_cache_is_read_and_a_newer_one_refused(tmp_path: Path) -> None:
    from metis_agent.curation.prompts import PromptCounts
    from metis_agent.sqlite import DiskCache

    for sample in samples("cache-*.sql"):
        path = tmp_path / f"{sample.stem}.sqlite"
        connection = sqlite3.connect(path)
        connection.executescript(sample.read_text())
        connection.close()
        with DiskCache(path) as kept:
            assert kept.get("key") == {"verdict": True, "why": "as the rubric says"}
    for name, opened in {
        "cache": DiskCache, "counts": lambda path: PromptCounts(path, verify=lambda *_: True),
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.sqlite"
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA user_version = {formats.CACHE + 1}")
        connection.close()
        with NEWER:
            opened(path)  # type: ignore[operator]


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_what_is_no_version_is_no_file_of_ours(version: object) -> None:
    with pytest.raises(InputError, match="an integer from 1"):
        formats.check_format({"format": version}, 1, "'x.json'")


# --- indexes, which are made again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 99])
def test_an_index_of_another_version_is_built_anew(version: int, tmp_path: Path) -> None:
    from metis_agent.tools.search.corpus import CorpusSearch

    (documents := tmp_path / "documents").mkdir()
    (documents / "paris.md").write_text("# Paris\n\nThe capital of France.")
    index = tmp_path / "index.sqlite"
    CorpusSearch.from_path(documents, index=index).close()
    connection = sqlite3.connect(index)
    connection.execute("DELETE FROM document")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()
    with CorpusSearch.from_path(documents, index=index) as search:
        assert [hit.title for hit in search.search("capital", 1)] == ["Paris"]


def test_an_index_of_images_of_another_version_is_built_anew(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from metis_agent.tools.search.image_folder import ImageFolder

    (pictures := tmp_path / "pictures").mkdir()
    image.linear_gradient("L").save(pictures / "red_bicycle.png")
    index = tmp_path / "index.jsonl"
    ImageFolder.build(pictures, index=index)
    head, *lines = index.read_text().splitlines()
    index.write_text("\n".join([json.dumps({**json.loads(head), "format": 99}), *["{}" for _ in lines]]) + "\n")
    assert [hit.source for hit in ImageFolder.build(pictures, index=index).search("bicycle", 1)] == ["red_bicycle.png"]


# --- tables that users bring -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", samples("outcomes.*"), ids=named)
def test_tables_of_outcomes_are_read(sample: Path) -> None:
    from metis_agent.rollouts.outcomes import read_outcomes

    table = read_outcomes(sample, direct="direct", tools={"text_search": "search"})
    assert table.actions == ("direct", "text_search")
    assert table.questions == ("Who won?", "hi")
    assert table.correct.tolist() == [[0.0, 1.0], [1.0, 0.5]]
    assert table.cost.tolist() == [[0.0, 2.0], [0.0, 2.0]]


def test_questions_by_hand_are_read() -> None:
    from metis_agent.rollouts.questions import read_questions

    for sample in samples("asked.*"):
        first, second = read_questions(sample)
        assert (first.text, first.answer, first.verifier) == ("What is 7 plus 5?", "12", "prose")
        assert isinstance(second, Question)
        assert (second.answer, second.verifier, second.kind) == ("Paris", "prose", "fact")
