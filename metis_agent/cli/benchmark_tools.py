"""The tools of `metis evaluate benchmark` where none are named: the sandboxed python tool, which has the pictures of
the conversation and shows the model its crops.
"""

from __future__ import annotations

from metis_agent.tools.python import PythonTool

__all__ = ["seeing_python"]

seeing_python = (PythonTool(),)
