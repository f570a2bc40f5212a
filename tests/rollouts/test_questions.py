import json
from pathlib import Path

import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.rollouts.questions import read_questions

ROWS = [
    {"question": "What is 2 + 2?", "answer": 4, "kind": "sum"},
    {"question": "Who?", "answer": "Ada", "id": "who", "verifier": "exact", "document": "d1"},
    {"question": "How long?", "context": "A passage.", "answer": None},
]


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_three_formats_give_the_same_questions(tmp_path: Path, suffix: str) -> None:
    path = jsonl(tmp_path, *ROWS)
    if suffix != ".jsonl":
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        rows = [{**row, "answer": row["answer"] and str(row["answer"])} for row in ROWS]
        names = ("id", "question", "answer", "verifier", "kind", "context", "document")
        table = pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in names]))
        path = tmp_path / f"questions{suffix}"
        (pyarrow.csv.write_csv if suffix == ".csv" else pyarrow.parquet.write_table)(table, path)
        path = path.rename(tmp_path / f"QUESTIONS{suffix.upper()}")
    sum_, who, how = read_questions(path)
    assert (sum_.answer, sum_.verifier, sum_.kind) == ("4", "prose", "sum")
    assert sum_.id.startswith("q-")
    assert (who.id, who.verifier, who.metadata["document"]) == ("who", "exact", "d1")
    assert how.text == "A passage.\n\nHow long?"
    assert how.metadata["context"] == "A passage."
    assert how.answer is None


@pytest.mark.parametrize(
    ("suffix", "text"), [(".csv", "question,answer\nWho?,{}\n"), (".jsonl", '{{"question": "Who?", "answer": "{}"}}')]
)
def test_files_of_other_programs_are_read(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"questions{suffix}"
    path.write_text(text.format("x" * 200_000), encoding="utf-8-sig")
    assert [(it.text, len(it.answer or "")) for it in read_questions(path)] == [("Who?", 200_000)]


def test_a_zero_is_text_as_well(tmp_path: Path) -> None:
    (question,) = read_questions(jsonl(tmp_path, {"question": 0, "context": 0, "answer": 0, "kind": 0, "id": 0}))
    assert (question.text, question.answer, question.kind, question.id) == ("0\n\n0", "0", "0", "0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,question,answer\n1,What is, then, x?,4\n", "line 2 has more cells"),
        ("question,answer,answer\nWho?,Ada,Bob\n", "names a column twice"),
    ],
)
def test_a_csv_whose_cells_have_no_column_of_their_own_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / "questions.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_questions(path)


def test_empty_cells_at_the_end_of_a_csvs_lines_say_nothing(tmp_path: Path) -> None:
    (path := tmp_path / "questions.csv").write_text("question,answer,,\nWho?,Ada,,\nWhen?,1815,,,,\n")
    assert [(it.text, it.answer) for it in read_questions(path)] == [("Who?", "Ada"), ("When?", "1815")]


def test_text_that_parquet_keeps_as_bytes_is_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({"question": [b"Who?"], "answer": ["Ad\u00e4".encode()], "photo": [b"\xff\xd8"]})
    pyarrow.parquet.write_table(table, path := tmp_path / "questions.parquet")
    (question,) = read_questions(path)
    assert (question.text, question.answer, question.metadata["photo"]) == ("Who?", "Ad\u00e4", b"\xff\xd8")


def test_a_row_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    assert len(read_questions(jsonl(tmp_path, ROWS[0], ROWS[0]))) == 1
    with pytest.raises(InputError, match="same id"):
        read_questions(jsonl(tmp_path, ROWS[0], {**ROWS[0], "answer": 5}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"asked": "x"}, "row 1 has no question"),
        ({"question": " "}, "row 1 has no question"),
        ({"question": "x", "verifier": "magic"}, "'magic'"),
        ([1], "one JSON object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(jsonl(tmp_path, row))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rows"):
        read_questions(jsonl(tmp_path))
    with pytest.raises(InputError, match="can't be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(ConfigurationError, match="none of"):
        read_questions(tmp_path / "questions.xlsx")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"question": "x"}\n{"question": ')
    with pytest.raises(InputError, match="line 2 is no JSON"):
        read_questions(torn)
