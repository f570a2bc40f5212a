import json

import pytest

from metis_agent.errors import ConfigurationError, InputError
from metis_agent.tools.search import Document, read_documents
from metis_agent.tools.search.documents import digest_documents, digest_path


def test_jsonl_lines_are_documents(tmp_path):
    lines = [
        {"id": "a", "title": "A", "text": "first", "url": "https://a", "other": 1},
        {"text": "second\u2028line"},
    ]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert list(read_documents(path)) == [
        Document(id="a", title="A", text="first", url="https://a"),
        Document(id="docs.jsonl:3", text="second\u2028line"),
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"title": "no text"}', '{"text": 3}', "[" * 10_000])
def test_a_bad_line_is_named_with_its_place(tmp_path, line):
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "good"}\n' + line, encoding="utf-8")
    with pytest.raises(InputError, match=r"docs\.jsonl:2"):
        list(read_documents(path))


def test_markdown_is_cut_into_passages_under_their_headings(tmp_path):
    long = "word " * 200  # 1,000 characters: two don't fit one passage
    path = tmp_path / "guide.md"
    path.write_text(f"Intro.\n\n# Setup #\n\n{long}\n\n{long}\n\n## Use\nCall it.\n\nThen stop.\n", "utf-8")
    documents = list(read_documents(path))
    assert [(it.id, it.title) for it in documents] == [
        ("guide.md#1", "guide"),
        ("guide.md#2", "Setup"),
        ("guide.md#3", "Setup"),
        ("guide.md#4", "Use"),
    ]
    assert documents[0].text == "Intro."
    assert documents[3].text == "## Use\nCall it.\n\nThen stop."


def test_a_long_paragraph_is_cut_between_words_and_nothing_is_lost(tmp_path):
    words = [f"word{i}" for i in range(2_000)]
    (tmp_path / "book.txt").write_text(" ".join(words) + "\n\n" + "x" * 3_000, "utf-8")
    documents = list(read_documents(tmp_path / "book.txt"))
    assert all(len(it.text) <= 1_200 for it in documents)
    text = " ".join(it.text for it in documents)
    assert text.split()[:2_000] == words
    assert text.count("x") == 3_000


def test_in_text_files_a_hash_is_no_heading(tmp_path):
    (tmp_path / "notes.txt").write_text("# not a heading\n\nmore", "utf-8")
    assert [it.title for it in read_documents(tmp_path / "notes.txt")] == ["notes"]


def test_a_folder_is_read_with_what_is_below_it_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B", "utf-8")
    (tmp_path / "a.md").write_text("A", "utf-8")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "C"}', "utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert [it.id for it in read_documents(tmp_path)] == ["a.md#1", "b.txt#1", "sub/c.jsonl:1"]


def test_no_documents_is_a_configuration_error(tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    for path in (tmp_path, tmp_path / "missing.txt", tmp_path / "image.png"):
        with pytest.raises(ConfigurationError, match=r"no documents at .*\.jsonl, \.md or \.txt"):
            list(read_documents(path))


def test_digests_change_with_any_change(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one", "utf-8")
    first = digest_path(tmp_path)
    assert digest_path(tmp_path) == first
    path.write_text("two", "utf-8")
    second = digest_path(tmp_path)
    path.rename(tmp_path / "b.txt")
    assert len({first, second, digest_path(tmp_path)}) == 3

    documents = [
        Document(id="1", text="ab"),
        Document(id="1", text="a", title="b"),
        Document(id="1a", text="b"),
    ]
    assert len({digest_documents([it]) for it in documents}) == 3
    assert digest_documents([Document(id="\ud800", text="")])
