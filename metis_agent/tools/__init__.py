"""The tools that Metis brings: `python`, `text_search`, `image_search`. Any other LangChain tool works as well.

- `python`, `text_search`, `image_search`: the tools
- `instrumented`: any tool with a time limit, retries, accounting, a result cache, secrets out (`redaction`); it
  is a `proxy` of the tool, which has the result cache too
- `images`: safe loading of images; `download`: safe fetching, from the public internet only
- `sandboxes` and `search`: what the tools stand on

Each name is imported when it is asked for, so that one tool does not load what the others need.
"""

from typing import TYPE_CHECKING

from metis_agent.errors import lazy_names

if TYPE_CHECKING:
    from metis_agent.tools.image_search import ImageSearchTool
    from metis_agent.tools.images import ImageRules, load_image
    from metis_agent.tools.instrumented import InstrumentedTool
    from metis_agent.tools.proxy import ResultCache
    from metis_agent.tools.python import PythonTool
    from metis_agent.tools.redaction import Redactor
    from metis_agent.tools.text_search import TextSearchTool

__all__ = [
    "ImageRules",
    "ImageSearchTool",
    "InstrumentedTool",
    "PythonTool",
    "Redactor",
    "ResultCache",
    "TextSearchTool",
    "load_image",
]

_MODULES = {
    "ImageRules": "images",
    "ImageSearchTool": "image_search",
    "InstrumentedTool": "instrumented",
    "PythonTool": "python",
    "Redactor": "redaction",
    "ResultCache": "proxy",
    "TextSearchTool": "text_search",
    "load_image": "images",
}

__getattr__ = lazy_names(__name__, _MODULES, "images")
