import asyncio
import gc
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, StorageError
from metis_agent.tools.search import AsyncSearchBackend, CorpusSearch, Document, SearchBackend, corpus
from metis_agent.tools.text_search import TextSearchTool

TEXTS = {
    "paris": ("Paris", "Paris is the capital of France, on the river Seine."),
    "lyon": ("Lyon", "Lyon is a city in France. Its river is the Rhone. It is far from Paris."),
    "tokyo": ("東京", "東京は日本の首都である。"),
    "beijing": ("北京", "北京是中华人民共和国的首都。"),
    "seoul": ("서울", "서울은 대한민국의 수도이다."),
    "coffee": ("コーヒー", "コーヒーは飲み物。黒猫"),
    "bangkok": ("กรุงเทพ", "กรุงเทพเป็นเมืองหลวงของประเทศไทย"),
    "cafe": ("Café", "Un café au lait, s'il vous plaît."),
}
DOCUMENTS = [Document(id=id_, title=title, text=text, url=f"https://{id_}") for id_, (title, text) in TEXTS.items()]


@pytest.fixture(scope="module")
def search():
    with CorpusSearch.build(DOCUMENTS) as made:
        yield made


def found(search, query, limit=5):
    return [hit.source for hit in search.search(query, limit)]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("paris", "paris"),  # in the title of one, in the text of both
        ("city on the river in France", "lyon"),
        ("CAPITAL France?", "paris"),
        ("日本の首都はどこですか", "tokyo"),
        ("中国的首都 人民共和国", "beijing"),
        ("대한민국 수도", "seoul"),
        ("ｺｰﾋｰ", "coffee"),
        ("コーヒー", "coffee"),
        ("猫", "coffee"),
        ("黒", "coffee"),
        ("ประเทศไทย", "bangkok"),
        ("cafe", "cafe"),
        ("CAFÉ", "cafe"),
        ("東", "tokyo"),
    ],
)
def test_the_right_document_comes_first(search, query, first):
    assert found(search, query)[0] == first


def test_any_term_may_match(search):
    assert set(found(search, "Seine Rhone")) == {"paris", "lyon"}
    assert found(search, "zebra Seine") == ["paris"]


def test_nothing_matches_nothing(search):
    assert found(search, "zebra") == found(search, "") == found(search, "?!") == []
    assert found(search, "paris", 0) == []


def test_a_hit_is_the_whole_document(search):
    hit = search.search("Seine", 1)[0]
    assert (hit.title, hit.text, hit.url, hit.source) == (*TEXTS["paris"], "https://paris", "paris")
    assert hit.score > 0


def test_limit_and_order(search):
    hits = search.search("France river capital Paris", 2)
    assert len(hits) == 2
    assert hits[0].score >= hits[1].score


def test_operators_and_quotes_are_plain_text(search):
    for query in (
        '"Seine',
        "Seine AND",
        "NOT Seine",
        "title:Seine",
        "Seine*",
        "(Seine",
        "NEAR(Seine",
        "-Seine",
    ):
        assert found(search, query)[0] == "paris", query


@given(st.text(st.characters(), max_size=60))
def test_any_query_is_answered(search, query):
    assert all(hit.source in TEXTS for hit in search.search(query, 5))


@given(
    st.lists(st.tuples(st.text(st.characters(), max_size=20), st.text(st.characters(), max_size=20)), max_size=4),
    st.text(st.characters(), max_size=20),
)
def test_any_document_can_be_indexed(texts, query):
    documents = [Document(id=str(i), title=title, text=text) for i, (title, text) in enumerate(texts)]
    with CorpusSearch.build(documents) as made:
        assert len(made) == len(documents)
        made.search(query, 3)


@given(st.text(st.characters(categories=("Lo", "Ll", "Nd")), min_size=1, max_size=12))
def test_a_document_is_found_by_its_own_text(text):
    with CorpusSearch.build([Document(id="it", text=text)]) as made:
        assert found(made, text) == ["it"]


def synthetic(count):
    """Documents with `common` in all, `half` in every second, `tenth` in every tenth, `rareN` in one.

    All of one length, which BM25 looks at too.
    """
    shares = {"half": 2, "third": 3, "tenth": 10}
    texts = (" ".join(word if i % every == 0 else "pad" for word, every in shares.items()) for i in range(count))
    return [Document(id=str(i), text=f"common rare{i} {text}") for i, text in enumerate(texts)]


def test_common_terms_rank_what_rare_terms_find():
    with CorpusSearch.build(synthetic(20_000)) as made:
        rare, common = made._split(corpus.query_terms("common third tenth rare9 rare10 rare11"))
        assert set(rare.split(" OR ")) == {'"rare9"', '"rare10"', '"rare11"'}
        assert common == '"tenth" OR "third"'  # and `common` weighs nothing
        # Each holds one rare term; 10 has `tenth` too, 9 has `third`, which says less, 11 neither.
        assert found(made, "common third tenth rare9 rare10 rare11") == ["10", "9", "11"]


def test_the_ranking_is_that_of_all_terms_where_a_rare_one_matches():
    query = "common half third tenth rare30 rare31 rare32"
    with CorpusSearch.build(synthetic(20_000)) as made:
        with made._connection() as connection:
            whole = made._ranked(connection, " OR ".join(corpus.query_terms(query).values()), 3)
        hits = made.search(query, 3)
        assert [int(hit.source) + 1 for hit in hits] == list(whole)
        assert [hit.score for hit in hits] == pytest.approx(list(whole.values()), abs=1e-4)


def test_a_query_of_common_terms_alone_is_answered():
    with CorpusSearch.build(synthetic(5_000)) as made:
        assert len(found(made, "common")) == 5
        assert len(found(made, "common half")) == 5


def test_an_empty_corpus_finds_nothing():
    with CorpusSearch.build([]) as made:
        assert (len(made), made.search("paris", 5)) == (0, [])


def test_title_weight_is_how_much_a_title_counts():
    documents = [
        Document(id="title", title="seine", text="x y z"),
        Document(id="text", title="x y z", text="seine"),
    ]
    with CorpusSearch.build(documents, title_weight=10) as title_first:
        assert found(title_first, "seine") == ["title", "text"]
    with CorpusSearch.build(documents, title_weight=0.1) as text_first:
        assert found(text_first, "seine") == ["text", "title"]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_title_weight_is_positive(weight):
    with pytest.raises(ConfigurationError, match="title_weight is"):
        CorpusSearch.build(DOCUMENTS, title_weight=weight)


def test_an_index_file_is_built_once_and_again_when_documents_change(tmp_path, monkeypatch):
    built = []
    build = corpus._build
    monkeypatch.setattr(corpus, "_build", lambda *a, **k: (built.append(1), build(*a, **k)))
    index = tmp_path / "cache" / "my index?#.sqlite3"
    for documents, builds in ((DOCUMENTS, 1), (iter(DOCUMENTS), 1), (DOCUMENTS[:2], 2), (DOCUMENTS[:2], 2)):
        with CorpusSearch.build(documents, index=index) as made:
            assert found(made, "Seine") == ["paris"]
        assert len(built) == builds
    assert os.listdir(index.parent) == [index.name]


def test_from_path_reads_files_and_keeps_an_index(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Paris\n\nOn the Seine.", "utf-8")
    index = tmp_path / "index"
    for _ in range(2):
        with CorpusSearch.from_path(folder, index=index) as made:
            assert [hit.title for hit in made.search("seine", 5)] == ["Paris"]
    (folder / "b.txt").write_text("The Seine again.", "utf-8")
    with CorpusSearch.from_path(folder, index=index) as made:
        assert len(made.search("seine", 5)) == 2
    with CorpusSearch.from_path(folder) as made:
        assert len(made.search("seine", 5)) == 2


def test_an_open_index_outlives_its_replacement(tmp_path):
    index = tmp_path / "index"
    with CorpusSearch.build(DOCUMENTS, index=index) as old:
        with CorpusSearch.build(DOCUMENTS[1:], index=index) as new:
            assert (len(new), found(new, "Seine")) == (len(DOCUMENTS) - 1, [])
        assert found(old, "Seine") == ["paris"]


def test_a_file_of_something_else_is_never_replaced(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("my notes, not a database" * 100)
    other = tmp_path / "other.sqlite3"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for path in (text, other):
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match="ame another path"):
            CorpusSearch.build(DOCUMENTS, index=path)
        assert path.read_bytes() == before


def test_an_index_of_another_format_is_built_anew(tmp_path, monkeypatch):
    index = tmp_path / "index"
    CorpusSearch.build(DOCUMENTS[:2], index=index).close()
    connection = sqlite3.connect(index)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with CorpusSearch.build(DOCUMENTS[:2], index=index) as made:
        assert found(made, "Seine") == ["paris"]


def test_an_index_that_can_not_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        CorpusSearch.build(DOCUMENTS, index=tmp_path / "file" / "index")


def test_a_failed_build_leaves_nothing(tmp_path):
    def broken():
        yield DOCUMENTS[0]
        raise KeyError("source gone")

    with pytest.raises(KeyError, match="source gone"):
        CorpusSearch.build(broken())
    (tmp_path / "docs.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(ValueError, match=r"docs\.jsonl:2"):
        CorpusSearch.from_path(tmp_path / "docs.jsonl", index=tmp_path / "index")
    assert os.listdir(tmp_path) == ["docs.jsonl"]


@pytest.mark.parametrize("in_file", [False, True])
def test_many_threads_search_at_once(tmp_path, in_file):
    documents = synthetic(2_000)
    with CorpusSearch.build(documents, index=tmp_path / "index" if in_file else None) as made:
        with ThreadPoolExecutor(32) as pool:
            answers = pool.map(lambda i: found(made, f"common rare{i}", 1), range(2_000))
        assert list(answers) == [[str(i)] for i in range(2_000)]


async def test_no_async_search_runs_on_the_event_loop(monkeypatch):
    seen = []
    search = CorpusSearch.search
    monkeypatch.setattr(
        CorpusSearch, "search", lambda self, *asked: seen.append(threading.get_ident()) or search(self, *asked)
    )
    with CorpusSearch.build([Document(id="1", text="Paris on the Seine")]) as made:
        message = await TextSearchTool(backend=made).ainvoke({"query": "Seine"})
    assert "Paris" in message
    assert seen
    assert threading.get_ident() not in seen


async def test_hundreds_of_async_searches_at_once():
    with CorpusSearch.build(synthetic(500)) as made:
        answers = await asyncio.gather(*(made.asearch(f"rare{i}", 1) for i in range(500)))
    assert [hits[0].source for hits in answers] == [str(i) for i in range(500)]


def test_dropping_it_closes_the_index(recwarn):
    made = CorpusSearch.build(DOCUMENTS)
    connection = made._pool.queue[0]
    del made
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


def test_it_is_a_backend(search):
    assert isinstance(search, SearchBackend)
    assert isinstance(search, AsyncSearchBackend)
