"""The real SDK against a server that speaks E2B's protocol: the python tool runs code there."""

import importlib.util
import os
from pathlib import Path

from metis_agent import PythonTool

path = Path(__file__).parents[2] / "tools" / "sandboxes" / "e2b_server.py"
spec = importlib.util.spec_from_file_location("e2b_server", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

for name in [name for name in os.environ if name.startswith("E2B_") or name.lower().endswith("_proxy")]:
    del os.environ[name]
with module.e2b_server() as server:
    os.environ |= {"E2B_API_KEY": module.KEY, "E2B_API_URL": server.url, "E2B_SANDBOX_URL": server.url}
    tool = PythonTool(backend="e2b")
    answer = tool.invoke({"code": "print(6 * 7)"})
    tool.close()
assert "42" in str(answer), answer
