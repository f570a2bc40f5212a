"""The tools of `metis ask` where a model is named and no tools are: the sandboxed python tool, which starts nothing
before its first call.
"""

from __future__ import annotations

from metis_agent.tools.python import PythonTool

__all__ = ["python_tools"]

python_tools = (PythonTool(images=False),)
