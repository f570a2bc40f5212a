import json
from pathlib import Path

import numpy as np
import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.rollouts.outcomes import OutcomeTable, check_unseen, held_out, read_outcomes
from metis_agent.rollouts.recorded import outcomes_from_trajectories
from metis_agent.types import Question, ToolOutcome, Trajectory


def rows(n: int = 60) -> list[dict[str, object]]:
    return [{"question": f"question {i}?", "direct_correct": i % 2, "search_correct": int(i % 3 > 0)} for i in range(n)]


def write(folder: Path, records: list[dict[str, object]], suffix: str = ".jsonl") -> Path:
    path = folder / f"outcomes{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        table = pa.Table.from_pylist(records)
        if suffix == ".csv":
            pyarrow.csv.write_csv(table, path)
        else:
            pyarrow.parquet.write_table(table, path)
    return path


def read(path: Path, **options: object) -> OutcomeTable:
    return read_outcomes(path, tools={"text_search": "search"}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_three_formats_give_one_table(tmp_path: Path, suffix: str) -> None:
    table = read(write(tmp_path, rows(), suffix))
    table.check_trainable()
    assert table.actions == ("direct", "text_search")
    assert table.correct[:3].tolist() == [[0, 0], [1, 1], [0, 1]]
    assert table.cost[0].tolist() == [0, 1]
    # c = r(0) - r(1) = 1 - 1/2.
    assert table.saving.tolist() == [0, 0.5]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direct_correct": None}, InputError, "in 0..1"),
        ({"direct_correct": 1.5}, InputError, "in 0..1"),
        ({"direct_correct": "yes"}, InputError, "no number"),
        ({"question": " "}, InputError, "blank"),
        ({"search_cost": -1.0}, InputError, "at least 0"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, change: dict[str, object], error: type, message: str) -> None:
    records = [{**row, "search_cost": 1.0} for row in rows()]
    if change.get("direct_correct") == "yes":
        records = [{**row, "direct_correct": "yes"} for row in records]
    records[7] = {**records[7], **change}
    with pytest.raises(error, match=message):
        read(write(tmp_path, records))


def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="10 rows"):
        read(write(tmp_path, rows(10))).check_trainable()
    with pytest.raises(InputError, match="same outcome"):
        read(write(tmp_path, [{**row, "direct_correct": 1, "search_correct": 0} for row in rows()])).check_trainable()
    read(write(tmp_path, [{**row, "search_correct": 1} for row in rows()])).check_trainable()  # a tool that never fails
    with pytest.raises(InputError, match="changes nothing"):
        read(write(tmp_path, [{**row, "search_correct": row["direct_correct"]} for row in rows()])).check_trainable()
    with pytest.raises(InputError, match="no branches"):
        read(write(tmp_path, [{"question": "a"}]))
    with pytest.raises(ConfigurationError, match="branch 'search'"):
        read(write(tmp_path, [{"question": "a", "direct_correct": 1}]))
    with pytest.raises(ConfigurationError, match="no column 'document'"):
        read(write(tmp_path, rows()), group_by="document")
    leak = [{**row, "document": i} for i, row in enumerate([*rows(), rows()[0]])]
    with pytest.raises(InputError, match="leak"):
        read(write(tmp_path, leak), group_by="document").check_trainable()


@pytest.mark.parametrize(
    ("suffix", "none"), [(".jsonl", None), (".csv", None), (".parquet", None), (".parquet", np.nan)]
)
@pytest.mark.parametrize("column", ["document", "run"])
def test_rows_without_a_group_are_refused_and_not_one_group(
    tmp_path: Path, suffix: str, none: object, column: str
) -> None:
    points = {"observations": "[]"} if column == "run" else {}
    records = [{**row, **points, column: i / 2 if i > 1 else none} for i, row in enumerate(rows())]
    with pytest.raises(InputError, match=f"Row 0 has a blank {'run' if points else 'group'}"):
        read(write(tmp_path, records, suffix), group_by=None if points else column)


def test_folds_keep_groups_together_and_seen_questions_are_found(tmp_path: Path) -> None:
    table = read(write(tmp_path, [{**row, "document": i // 6} for i, row in enumerate(rows())]), group_by="document")
    fold = table.folds(5, seed=1)
    assert all(len(set(fold[i : i + 6])) == 1 for i in range(0, 60, 6))
    assert set(fold) == set(range(5))
    seen = table.take(range(10))
    assert check_unseen(table, seen.keys).sum() == 50
    with pytest.raises(InputError, match="All 10 questions"):
        check_unseen(seen, table.keys)
    with pytest.raises(InputError, match="groups for 20 folds"):
        table.folds(20, seed=1)


def test_draft_columns_are_read(tmp_path: Path) -> None:
    records = [
        {**row, "draft_entropy": None if i == 3 else float(i), "draft_answer": "Paris", "direct_answer": "paris."}
        for i, row in enumerate(rows())
    ]
    table = read(write(tmp_path, records))
    assert set(table.draft) == {
        "draft_entropy", "draft_words", "draft_digits", "draft_overlap", "draft_stop", "draft_agreement",
        "draft_containment",
    }  # fmt: skip
    assert np.isnan(table.draft["draft_entropy"]).sum() == 1
    assert table.draft["draft_agreement"][0] == 1


def test_outcomes_come_from_recorded_runs() -> None:
    def run(question: str, answer: str, tool: str | None) -> Trajectory:
        outcomes = () if tool is None else (ToolOutcome(call_id="1", tool=tool, arguments={}, status="ok"),)
        asked = Question(id=question, text=f"{question}?", answer="42")
        return Trajectory(id=f"{question}{answer}{tool}", question=asked, answer=answer, outcomes=outcomes)

    runs = [run("a", "42", None), run("a", "41", None), run("a", "42", "search"), run("b", "42", None)]
    table = outcomes_from_trajectories(runs, tools=["search"])
    assert table.questions == ("a?",)
    assert table.correct.tolist() == [[0.5, 1.0]]
    assert table.cost.tolist() == [[0.0, 1.0]]
    assert table.dropped == {"question without all branches": 1}
    with pytest.raises(InputError, match="every branch"):
        outcomes_from_trajectories(runs[3:], tools=["search"])


def test_a_share_of_the_groups_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    table = read(write(tmp_path, [{**row, "document": i // 6} for i, row in enumerate(rows(600))]), group_by="document")
    left_out = held_out(table, 0.3, seed=0)
    assert 0.15 < left_out.mean() < 0.45
    assert all(len(set(left_out[i : i + 6])) == 1 for i in range(0, 600, 6))
    order = np.random.default_rng(0).permutation(600)
    assert (held_out(table.take(order), 0.3, seed=0) == left_out[order]).all()
    assert (held_out(table, 0.3, seed=1) != left_out).any()
    assert not held_out(table, 0.0, seed=0).any()
    with pytest.raises(ConfigurationError, match="below 1"):
        held_out(table, 1.0, seed=0)


def test_text_columns_of_a_csv_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.csv"
    lines = [f"{i:03d},{'01' if i % 2 else '1'},1e{i},{i % 2},{(i + 1) % 2}" for i in range(4)]
    header = "question,document,context,direct_correct,search_correct\n"
    path.write_text(header + "\n".join(lines))
    table = read(path, group_by="document")
    assert table.questions == ("000", "001", "002", "003")
    assert table.groups == ("1", "01", "1", "01")
    assert table.contexts == ("1e0", "1e1", "1e2", "1e3")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_booleans_are_numbers_in_every_format(tmp_path: Path, suffix: str) -> None:
    records = [{**row, "direct_correct": i % 3 == 0, "draft_sure": i % 2 == 0} for i, row in enumerate(rows())]
    table = read(write(tmp_path, records, suffix))
    assert table.correct[:4, 0].tolist() == [1, 0, 0, 1]
    assert table.draft["draft_sure"][:3].tolist() == [1, 0, 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_draft_that_is_a_number_is_read_as_a_draft(tmp_path: Path, suffix: str) -> None:
    table = read(write(tmp_path, [{**row, "draft_answer": i} for i, row in enumerate(rows())], suffix))
    assert "draft_answer" not in table.draft
    assert table.draft
