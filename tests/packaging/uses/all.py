"""Every extra at once: the Python of every page of the documentation runs, and prints what the page says."""

import contextlib
import importlib
import io
import os
import re
from pathlib import Path

for module in (
    "e2b_code_interpreter", "ddgs", "fastapi", "langchain", "langchain_openai", "math_verify", "PIL", "tantivy",
    "torch", "transformers", "trl",
):  # fmt: skip
    importlib.import_module(module)

DOCS = Path(__file__).parents[3] / "docs"
SNIPPET = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
done, work = 0, Path.cwd()
for page in sorted(DOCS.rglob("*.md")):
    names = {"__name__": "__main__"}
    folder = work / page.stem
    folder.mkdir()
    os.chdir(folder)
    for code, expected in SNIPPET.findall(page.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), names)
        assert printed.getvalue().strip() == expected.strip(), (page.name, printed.getvalue(), expected)
        done += 1
    os.chdir(work)
assert done > 10, done
print(f"{done} snippets")
