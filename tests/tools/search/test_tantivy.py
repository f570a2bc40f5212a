import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_agent.errors import ConfigurationError, MissingDependencyError
from metis_agent.tools.search import AsyncSearchBackend, CorpusSearch, Document
from metis_agent.tools.search.corpus import TantivySearch

pytest.importorskip("tantivy")

TEXTS = {
    "paris": ("Paris", "Paris is the capital of France, on the river Seine."),
    "lyon": ("Lyon", "Lyon is a city in France. Its river is the Rhone. It is far from Paris."),
    "tokyo": ("東京", "東京は日本の首都である。"),
    "beijing": ("北京", "北京是中华人民共和国的首都。"),
    "coffee": ("コーヒー", "コーヒーは飲み物。黒猫"),
    "cafe": ("Café", "Un café au lait, s'il vous plaît."),
}
DOCUMENTS = [Document(id=id_, title=title, text=text, url=f"https://{id_}") for id_, (title, text) in TEXTS.items()]
SEARCH = TantivySearch.build(DOCUMENTS)


def found(query, limit=5):
    return [hit.source for hit in SEARCH.search(query, limit)]


@pytest.mark.parametrize(
    "query",
    ["paris", "city on the river in France", "CAPITAL France?", "日本の首都はどこですか", "中国的首都 人民共和国",
     "ｺｰﾋｰ", "猫", "黒", "CAFÉ", "東", "\"Seine", "Seine AND", "NOT Seine", "title:Seine", "Seine*", "(Seine",
     "-Seine", "Seine^9",
     "zebra Seine"],
)  # fmt: skip
def test_it_finds_what_the_embedded_engine_finds(query):
    with CorpusSearch.build(DOCUMENTS) as corpus:
        assert found(query)[0] == corpus.search(query, 1)[0].source


def test_nothing_matches_nothing():
    assert found("zebra") == found("") == found("?!") == found("paris", 0) == []


def test_a_hit_is_the_whole_document():
    hit = SEARCH.search("Seine", 1)[0]
    assert (hit.title, hit.text, hit.url, hit.source) == (*TEXTS["paris"], "https://paris", "paris")
    assert hit.score > 0
    assert len(SEARCH) == 6


def test_threads_and_tasks():
    assert isinstance(SEARCH, AsyncSearchBackend)
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: found("Seine")[0], range(200))) == {"paris"}
    assert asyncio.run(SEARCH.asearch("Seine", 1)) == SEARCH.search("Seine", 1)


def test_from_path(tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox")
    assert TantivySearch.from_path(tmp_path).search("fox", 1)[0].source == "a.txt#1"


@given(st.text(st.characters(), max_size=60))
def test_any_query_is_answered(query):
    assert all(hit.source in TEXTS for hit in SEARCH.search(query, 5))


@given(st.text(st.characters(), max_size=40))
def test_any_document_can_be_indexed(text):
    made = TantivySearch.build([Document(id="1", title=text, text=text)])
    assert len(made) == 1
    made.search(text, 1)


def test_a_long_word():
    made = TantivySearch.build([Document(id="1", text="x" * 200_000 + " fox")])
    assert made.search("fox", 1)[0].source == "1"


def test_settings_and_the_extra(monkeypatch):
    with pytest.raises(ConfigurationError, match="title_weight"):
        TantivySearch.build([], title_weight=0)
    monkeypatch.setitem(sys.modules, "tantivy", None)
    with pytest.raises(MissingDependencyError, match=r"langgraph-metis\[tantivy\]"):
        TantivySearch.build([])
