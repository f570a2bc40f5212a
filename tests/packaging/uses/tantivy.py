"""The faster index finds its document."""

from metis_agent.tools.search.corpus import TantivySearch
from metis_agent.tools.search.documents import Document

texts = {"paris": "Paris is the capital of France.", "tokyo": "東京は日本の首都である。"}
search = TantivySearch.build([Document(id=id_, title=id_, text=text) for id_, text in texts.items()])
assert [hit.source for hit in search.search("capital France", 1)] == ["paris"]
assert [hit.source for hit in search.search("首都", 1)] == ["tokyo"]
