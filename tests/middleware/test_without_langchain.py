"""LangChain is an extra: without it the rest of Metis works, and the middleware says what to install."""

import subprocess
import sys

import pytest

import metis_agent

HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "langchain" or name.startswith("langchain."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
import metis_agent
assert metis_agent.create_metis_agent
try:
    from metis_agent import MetisGateMiddleware
except metis_agent.errors.MissingDependencyError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_error_names_the_extra():
    assert "pip install 'langgraph-metis[langchain]'" in run(HIDDEN)


def test_importing_metis_does_not_import_langchain():
    assert run("import sys, metis_agent; print('langchain' in sys.modules)").strip() == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = metis_agent.nothing
