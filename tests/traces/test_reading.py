"""The files of an import: packed, in other encodings, torn; and documents read element by element."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_agent.errors import InputError, StorageError
from metis_agent.traces import reading
from tests.traces.exports import lines, whole


def test_a_gzip_file_that_breaks_off(imported):
    packed = gzip.compress(lines(*(record for n in range(500) for record in whole(f"t{n}"))).encode())
    report, runs = imported(packed[: len(packed) // 2], "export.jsonl.gz")
    assert 50 < len(runs) < 450
    assert any("gzip stream breaks off" in reason for reason in report.reasons)


def test_a_bulk_export_in_parquet(imported, tmp_path):
    records = [*whole("t1"), *whole("t2")]
    for record in records:
        for key in ("inputs", "outputs"):
            record[key] = json.dumps(record[key])
        record["extra"] = json.dumps({"metadata": {"thread_id": "c"}})
        record["feedback_stats"] = json.dumps({"thumb": {"n": 2, "avg": 0.5}})
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "made.parquet", row_group_size=2)
    report, (first, second) = imported((tmp_path / "made.parquet").read_bytes(), "export.parquet")
    assert (report.records, first.answer, second.conversation) == (4, "Ann.", "c")
    assert first.metadata["feedback"] == [{"key": "thumb", "score": 0.5, "n": 2}]
    broken = (tmp_path / "made.parquet").read_bytes()[:-20]
    with pytest.raises(InputError, match="no format that is known"):
        imported(broken, "broken.parquet")


def zipped(content):
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        archive.writestr("deep/runs.jsonl", content)
        archive.writestr("notes.txt", "none of it")
    return packed.getvalue()


PACKED = {
    "plain.jsonl": lambda text: text,
    "marked.jsonl": lambda text: b"\xef\xbb\xbf" + text,
    "utf16.jsonl": lambda text: text.decode().encode("utf-16"),
    "windows.jsonl": lambda text: text.replace(b"\n", b"\r\n"),
    "small.jsonl.gz": gzip.compress,
    "small.jsonl.bz2": bz2.compress,
    "small.jsonl.xz": lzma.compress,
    "many.zip": zipped,
    "chained.json": lambda text: text.replace(b"\n", b""),
    "page.json": lambda text: b'{"cursors": {"next": null}, "runs": [' + b",".join(text.splitlines()) + b"]}",
}


@pytest.mark.parametrize("name", PACKED)
def test_the_same_export_however_it_was_written(imported, name):
    text = lines(*whole("a", "Wer, José?"), *whole("b", "誰?")).encode()
    report, runs = imported(PACKED[name](text), name)
    assert [run.question.text for run in runs] == ["Wer, José?", "誰?"]
    assert (report.trajectories, report.rejected) == (2, 0)


def test_a_line_of_two_objects_costs_no_other_line(imported):
    one, *others = lines(*whole("a", "A?"), *whole("b", "B?"), *whole("c", "C?")).splitlines()
    torn = [one + others[0], '{"id": "torn', *others[1:]]
    report, runs = imported("\n".join(torn))
    assert report.rejected >= 2
    assert {"B?", "C?"} <= {run.question.text for run in runs}


def test_what_is_packed_otherwise_is_named(imported):
    bundle = io.BytesIO()
    with tarfile.open(fileobj=bundle, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("runs.jsonl"))
    for content, name, what in (
        (bundle.getvalue(), "runs.tar.gz", "a tar archive"),
        (b"\x28\xb5\x2f\xfd....", "runs.jsonl.zst", "compressed with zstd"),
        (zipped("")[:40], "half.zip", "can't be read as a zip"),
    ):
        with pytest.raises(StorageError, match=what):
            imported(content, name)


def test_a_line_in_another_encoding_is_rejected_and_the_others_are_read(imported):
    odd = json.dumps(whole("b", "Wer, José?")[1], ensure_ascii=False).encode("latin-1") + b"\n"
    wide = json.dumps(whole("c")[1]).encode("utf-16-be") + b"\n"
    report, runs = imported(odd + wide + lines(*whole("a")).encode())
    assert len(runs) == 1
    assert report.rejected == 2
    assert any("not in UTF-8" in reason for reason in report.reasons)


@pytest.mark.parametrize("blocks", [1, 7, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
def test_documents_are_read_element_by_element(tmp_path, monkeypatch, blocks, indent):
    monkeypatch.setattr(reading, "_BLOCK", blocks)
    elements = [{"text": 'a "quoted] {brace\\'}, {"inner": [{"deep": [1]}, []]}, {"empty": {}}]
    shapes = {"array.json": elements, "page.json": {"data": elements, "meta": {"next": None}}}
    for name, shape in shapes.items():
        if name == "page.json" and indent is None:
            continue  # on one line it is a record
        (tmp_path / name).write_text(json.dumps(shape, indent=indent))
        assert [record.value for record in reading.records_of(str(tmp_path / name))] == elements
        assert [record.number for record in reading.records_of(str(tmp_path / name), skip=1)] == [2, 3]
