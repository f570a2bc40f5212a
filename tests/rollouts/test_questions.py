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
