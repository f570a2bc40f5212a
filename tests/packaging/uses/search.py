"""The web search is made; where there is no network it says so in time, as a result that a model can read."""

import time

from metis_agent import TextSearchTool
from metis_agent.tools.search import web_search

started = time.monotonic()
tool = TextSearchTool(backend=web_search(seconds=8, retries=0))
message = tool.invoke({"type": "tool_call", "id": "1", "name": "text_search", "args": {"query": "capital of France"}})
assert time.monotonic() - started < 60
said = message.text
assert "Paris" in said or "search" in said.lower(), said
